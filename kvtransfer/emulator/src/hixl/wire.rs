//! What a client and a server say to each other: `L` asks for the regions, `R` for bytes, `Q` takes leave.

use std::io::{self, Read, Write};

use super::Registered;

pub(super) const LIST: u8 = b'L';
pub(super) const READ: u8 = b'R';
pub(super) const LEAVE: u8 = b'Q';

pub(super) fn u8(from: &mut impl Read) -> io::Result<u8> {
    let mut byte = [0; 1];
    from.read_exact(&mut byte)?;
    Ok(byte[0])
}

pub(super) fn u32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

pub(super) fn u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

pub(super) fn write_regions(to: &mut impl Write, regions: &[Registered]) -> io::Result<()> {
    let mut out = (regions.len() as u32).to_le_bytes().to_vec();
    for region in regions {
        out.extend(region.kind.to_le_bytes());
        out.extend(region.start.to_le_bytes());
        out.extend(region.len.to_le_bytes());
        out.extend((region.tag.len() as u32).to_le_bytes());
        out.extend(region.tag.as_bytes());
    }
    to.write_all(&out)
}

pub(super) fn read_regions(from: &mut impl Read) -> io::Result<Vec<Registered>> {
    let count = u32(from)?;
    let mut regions = Vec::new();
    for _ in 0..count {
        let kind = u32(from)? as i32;
        let (start, len) = (u64(from)?, u64(from)?);
        let mut tag = vec![0; u32(from)? as usize];
        from.read_exact(&mut tag)?;
        let tag = String::from_utf8(tag).map_err(io::Error::other)?;
        regions.push(Registered { kind, start, len, tag });
    }
    Ok(regions)
}
