//! The head of a GGUF file, versions 2 and 3: metadata and the table of tensors, with every bound checked.
//!
//! Works on bytes alone. Nothing is allocated by what a count says, only by what is there: arrays stay where they lie
//! until someone asks for them. See ggml's `docs/gguf.md` for the format.

use std::{collections::BTreeMap, ops::Range};

/// What is wrong with a file: the field, and why.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Not what the format says it must be.
    Damaged { field: String, reason: String },
    /// Well formed, but not something Baton reads: (field, found, supported).
    Unsupported { field: String, found: String, supported: String },
}

impl Fault {
    pub(crate) fn damaged(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Damaged { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(
        field: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        Self::Unsupported { field: field.into(), found: found.into(), supported: supported.into() }
    }
}

/// A metadata value. Arrays are where they lie in the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

/// An array: its elements' type, how many, and their bytes. Its bounds have been checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array<'a> {
    kind: u32,
    count: usize,
    bytes: &'a [u8],
}

/// One line of the table of tensors.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorLine<'a> {
    pub(crate) name: &'a str,
    /// Elements along each axis, innermost first as GGUF has them.
    pub(crate) axes: Vec<u64>,
    /// ggml's number of the type.
    pub(crate) kind: u32,
    /// Bytes from the start of the data.
    pub(crate) offset: u64,
}

/// The parsed head of a file.
#[derive(Debug)]
pub(crate) struct Header<'a> {
    pub(crate) metadata: BTreeMap<&'a str, Value<'a>>,
    pub(crate) tensors: Vec<TensorLine<'a>>,
    /// Where tensor data begins, in bytes from the start of the file; may lie past a cut file's end.
    pub(crate) data_start: usize,
    pub(crate) alignment: u64,
}

const UINT8: u32 = 0;
const INT8: u32 = 1;
const UINT16: u32 = 2;
const INT16: u32 = 3;
const UINT32: u32 = 4;
const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const UINT64: u32 = 10;
const INT64: u32 = 11;
const FLOAT64: u32 = 12;

/// Arrays of arrays are allowed; no writer nests deeper than two.
const MOST_NESTING: u32 = 4;
/// ggml's limit on a tensor's axes.
const MOST_AXES: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

impl<'a> Header<'a> {
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, Fault> {
        let mut at = Cursor { file, position: 0 };
        if at.take(4, "magic")? != MAGIC {
            return Err(Fault::damaged("magic", "it does not begin with GGUF"));
        }
        let version = at.u32("version")?;
        if !(2..=3).contains(&version) {
            let big_endian = (2..=3).contains(&version.swap_bytes());
            let found = if big_endian { "big-endian".to_owned() } else { version.to_string() };
            return Err(Fault::unsupported("GGUF version", found, "2, 3 (little-endian)"));
        }
        let tensor_count = at.u64("number of tensors")?;
        let metadata_count = at.u64("number of metadata entries")?;
        // Each takes at least this many bytes, so that a count beyond the file is seen before anything is done.
        at.at_least(tensor_count, 8 + 4 + 4 + 8, "number of tensors")?;
        at.at_least(metadata_count, 8 + 4 + 1, "number of metadata entries")?;
        let mut metadata = BTreeMap::new();
        for entry in 0..metadata_count {
            let key = at.text(&format!("key of metadata entry {entry}"))?;
            let kind = at.u32(key)?;
            let value = at.value(kind, key)?;
            if metadata.insert(key, value).is_some() {
                return Err(Fault::damaged(key, "it is there twice"));
            }
        }
        let tensors = (0..tensor_count).map(|line| at.tensor_line(line)).collect::<Result<_, _>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(other) => {
                return Err(Fault::damaged(
                    "general.alignment",
                    format!("{other:?} is not a small power of two"),
                ));
            }
        };
        // `position` is within the file and the alignment small, so this cannot overflow.
        let data_start = at.position.next_multiple_of(alignment as usize);
        Ok(Self { metadata, tensors, data_start, alignment })
    }

    /// Where a tensor of `bytes` bytes at `offset` lies in a file of `file_bytes` bytes.
    pub(crate) fn locate(
        &self,
        line: &TensorLine<'_>,
        bytes: u64,
        file_bytes: usize,
    ) -> Result<Range<usize>, Fault> {
        let field = || format!("tensor {}", line.name);
        if !line.offset.is_multiple_of(self.alignment) {
            let reason = format!("offset {} is not a multiple of {}", line.offset, self.alignment);
            return Err(Fault::damaged(field(), reason));
        }
        let start = (self.data_start as u64).saturating_add(line.offset);
        let end = start.saturating_add(bytes);
        if end > file_bytes as u64 {
            let reason = format!("it ends at byte {end}, the file at byte {file_bytes}");
            return Err(Fault::damaged(field(), reason));
        }
        Ok(start as usize..end as usize)
    }
}

impl<'a> Array<'a> {
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The elements, if the array is of strings.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<String>, Fault> {
        if self.kind != STRING {
            return Err(Fault::damaged(field, "it is not an array of strings"));
        }
        let mut at = Cursor { file: self.bytes, position: 0 };
        (0..self.count).map(|_| at.text(field).map(str::to_owned)).collect()
    }

    /// The elements, if the array is of numbers.
    pub(crate) fn numbers(&self, field: &str) -> Result<Vec<f64>, Fault> {
        let mut at = Cursor { file: self.bytes, position: 0 };
        let number = |_| match at.value(self.kind, field)? {
            Value::Unsigned(n) => Ok(n as f64),
            Value::Signed(n) => Ok(n as f64),
            Value::Float(x) => Ok(x),
            _ => Err(Fault::damaged(field, "it is not an array of numbers")),
        };
        (0..self.count).map(number).collect()
    }
}

/// Reads forward; every step is checked against the end.
struct Cursor<'a> {
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.position
    }

    fn take(&mut self, bytes: u64, field: &str) -> Result<&'a [u8], Fault> {
        if bytes > self.left() as u64 {
            let reason = format!("it needs {bytes} bytes, {} are left", self.left());
            return Err(Fault::damaged(field, reason));
        }
        let from = self.position;
        self.position += bytes as usize;
        Ok(&self.file[from..self.position])
    }

    /// Fails if `count` elements of at least `each` bytes cannot be in what is left.
    fn at_least(&self, count: u64, each: u64, field: &str) -> Result<(), Fault> {
        if count.saturating_mul(each) > self.left() as u64 {
            let reason = format!("{count} entries do not fit in the {} bytes left", self.left());
            return Err(Fault::damaged(field, reason));
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64, field)?);
        Ok(bytes)
    }

    fn u32(&mut self, field: &str) -> Result<u32, Fault> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64, Fault> {
        self.array(field).map(u64::from_le_bytes)
    }

    fn text(&mut self, field: &str) -> Result<&'a str, Fault> {
        let length = self.u64(field)?;
        let bytes = self.take(length, field)?;
        std::str::from_utf8(bytes).map_err(|_| Fault::damaged(field, "it is not UTF-8 text"))
    }

    fn value(&mut self, kind: u32, field: &str) -> Result<Value<'a>, Fault> {
        Ok(match kind {
            UINT8 => Value::Unsigned(u8::from_le_bytes(self.array(field)?).into()),
            INT8 => Value::Signed(i8::from_le_bytes(self.array(field)?).into()),
            UINT16 => Value::Unsigned(u16::from_le_bytes(self.array(field)?).into()),
            INT16 => Value::Signed(i16::from_le_bytes(self.array(field)?).into()),
            UINT32 => Value::Unsigned(self.u32(field)?.into()),
            INT32 => Value::Signed(i32::from_le_bytes(self.array(field)?).into()),
            FLOAT32 => Value::Float(f32::from_le_bytes(self.array(field)?).into()),
            BOOL => Value::Bool(self.array::<1>(field)? != [0]),
            STRING => Value::Text(self.text(field)?),
            ARRAY => Value::Array(self.array_value(field, 0)?),
            UINT64 => Value::Unsigned(self.u64(field)?),
            INT64 => Value::Signed(i64::from_le_bytes(self.array(field)?)),
            FLOAT64 => Value::Float(f64::from_le_bytes(self.array(field)?)),
            _ => return Err(Fault::damaged(field, format!("there is no value type {kind}"))),
        })
    }

    /// Steps over an array and remembers where it is.
    fn array_value(&mut self, field: &str, nesting: u32) -> Result<Array<'a>, Fault> {
        let kind = self.u32(field)?;
        let count = self.u64(field)?;
        let from = self.position;
        match element_bytes(kind) {
            Some(each) => drop(self.take(count.saturating_mul(each), field)?),
            None if kind == STRING => {
                self.at_least(count, 8, field)?;
                for _ in 0..count {
                    self.text(field)?;
                }
            }
            None if kind == ARRAY && nesting < MOST_NESTING => {
                self.at_least(count, 12, field)?;
                for _ in 0..count {
                    self.array_value(field, nesting + 1)?;
                }
            }
            None if kind == ARRAY => return Err(Fault::damaged(field, "arrays are nested too deep")),
            None => return Err(Fault::damaged(field, format!("there is no value type {kind}"))),
        }
        // Every element takes at least a byte, so that `count` fits usize now.
        Ok(Array { kind, count: count as usize, bytes: &self.file[from..self.position] })
    }

    fn tensor_line(&mut self, line: u64) -> Result<TensorLine<'a>, Fault> {
        let name = self.text(&format!("name of tensor {line}"))?;
        let field = format!("tensor {name}");
        let axes = self.u32(&field)?;
        if axes == 0 || axes > MOST_AXES {
            return Err(Fault::damaged(field, format!("it has {axes} axes, not 1 to {MOST_AXES}")));
        }
        let axes = (0..axes).map(|_| self.u64(&field)).collect::<Result<_, _>>()?;
        Ok(TensorLine { name, axes, kind: self.u32(&field)?, offset: self.u64(&field)? })
    }
}

/// Bytes of an element of fixed size.
fn element_bytes(kind: u32) -> Option<u64> {
    match kind {
        UINT8 | INT8 | BOOL => Some(1),
        UINT16 | INT16 => Some(2),
        UINT32 | INT32 | FLOAT32 => Some(4),
        UINT64 | INT64 | FLOAT64 => Some(8),
        _ => None,
    }
}
