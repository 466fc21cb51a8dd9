//! What the targets in `integration-tests/fuzz` call: each takes any bytes and must neither panic nor break a promise, which
//! its README tells. The corpora that are kept there run with the unit tests, too.

use baton_proto::v1;
use prost::Message as _;

use crate::{
    KvLayout,
    transport::{
        DataKey,
        frame::{Form, HEADER_BYTES, Header, MAX_FRAME_SLICES},
        hello::{ANSWER_BYTES, HELLO_BYTES, Hello, MAX_TERMS},
    },
};

use crate::node::fuzz::{connection, messages};

fn key() -> Option<DataKey> {
    DataKey::from_wire(&[7; 16])
}

/// How peers' data connections begin and what their frames say; the first byte says of what kind the rest is.
pub fn frames(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind % 8 {
        0..=2 => heads(rest),
        3 | 4 => hellos(rest),
        #[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
        5 => crate::transport::fuzz_rdma(rest),
        _ => crate::transport::fuzz_ascend(rest),
    }
}

/// What reaches a node that runs: an odd first byte and a script for a data connection, or an even one and messages of a
/// control stream.
pub fn node(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    if kind % 2 == 1 { connection(rest) } else { messages(rest) }
}

/// Headers and tables of frames, of both forms.
fn heads(bytes: &[u8]) {
    let (Some((&first, rest)), Some(key)) = (bytes.split_first(), key()) else { return };
    let form = if first % 2 == 0 { Form::Carried } else { Form::Announced };
    let slice_bytes = u32::from(first / 2);
    let Some((head, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head, form, slice_bytes) else { return };
    assert!((1..=MAX_FRAME_SLICES).contains(&header.run.count));
    assert!(header.table_bytes() <= 48 << 10);
    assert_eq!(header.payload_bytes(), u64::from(header.run.count) * u64::from(slice_bytes));
    let Some(table) = rest.get(..header.table_bytes()) else { return };
    assert_eq!(header.entries(table).count(), header.run.count as usize);
    assert!(!Header::proven(&key, head, table), "the key was guessed");
    let mut again = Vec::new();
    header.encode(&key, header.entries(table), &mut again);
    let (head, written) = again.split_at(HEADER_BYTES);
    assert_eq!(written, table);
    let head = head.try_into().expect("a header");
    assert!(Header::proven(&key, head, table));
    assert_eq!(Header::decode(head, form, slice_bytes), Ok(header));
}

/// How data connections begin: hellos, answers, grants.
fn hellos(bytes: &[u8]) {
    let Some(key) = key() else { return };
    if let Some((head, terms)) = bytes.split_first_chunk::<HELLO_BYTES>()
        && let Ok(hello) = Hello::decode(*head)
    {
        assert!(hello.terms_bytes() <= MAX_TERMS);
        let (_, _) = (hello.kind(), hello.link());
        assert!(!hello.proven(&key, terms), "the key was guessed");
        for (reply, length) in [
            (hello.answer(&key, terms), Hello::answer_terms_bytes as fn(&[u8; ANSWER_BYTES]) -> _),
            (hello.grant(&key, terms), Hello::grant_terms_bytes),
        ] {
            let (head, said) = reply.split_first_chunk::<ANSWER_BYTES>().expect("a whole reply");
            assert!(terms.len() > MAX_TERMS || length(head) == Ok(terms.len()));
            assert!(hello.answered(&key, head, said));
        }
    }
    if let Some((head, said)) = bytes.split_first_chunk::<ANSWER_BYTES>() {
        for length in [Hello::answer_terms_bytes(head), Hello::grant_terms_bytes(head)] {
            assert!(length.is_err() || length.is_ok_and(|length| length <= MAX_TERMS));
        }
        if let Ok(hello) = Hello::decode([0; HELLO_BYTES].map(|_| b'B')) {
            assert!(!hello.answered(&key, head, said));
        }
    }
}

/// Layouts that a peer may announce, and the plans by which its slices become this node's and the reverse.
pub fn layouts(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let Ok(wire) = v1::KvLayout::decode(rest) else { return };
    let own = own_layout(first % 2 == 1);
    let _ = own.of_peer(&wire); // as it says it, with whatever digest
    let v1::KvLayout { format, dtype, block_tokens, layers, kv_heads, head_dim, .. } = wire;
    let said = KvLayout {
        model_revision: own.model_revision.clone(),
        format,
        dtype,
        block_tokens,
        layers,
        kv_heads,
        head_dim,
        rope_dim: wire.rope_dim,
        tensor_parallel: wire.tensor_parallel,
        slice_bytes: wire.block_bytes,
    };
    let Ok(peer) = own.of_peer(&(&said).into()) else { return };
    let plans = [(own.plan_from(&peer), &peer, &own), (own.plan_to(&peer), &own, &peer)];
    for (plan, source, target) in plans {
        let Ok(Some(plan)) = plan else { continue };
        if plan.runs() > 1 << 12 {
            continue; // a node refuses them from half a million on
        }
        let expansion = plan.expand();
        let tokens = source.block_tokens.min(1 << 10).saturating_add(1);
        for descriptor in expansion.of_blocks(0, 0..2, tokens).take(1 << 12) {
            assert!(descriptor.source_block < source.blocks_for(tokens), "{descriptor:?}");
            assert!(descriptor.target_block < target.blocks_for(tokens), "{descriptor:?}");
        }
    }
}

fn own_layout(latent: bool) -> KvLayout {
    let (format, kv_heads, head_dim, rope_dim) =
        if latent { ("cpu-latent-16", 1, 576, 64) } else { ("cpu-panel-16-columns", 3, 64, 0) };
    let values = if latent { head_dim } else { 2 * kv_heads * head_dim };
    KvLayout {
        model_revision: "r1".into(),
        format: format.into(),
        dtype: "bf16".into(),
        block_tokens: 16,
        layers: 2,
        kv_heads,
        head_dim,
        rope_dim,
        tensor_parallel: 1,
        slice_bytes: u64::from(values) * 16 * 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(feature = "explore", ignore = "shuttle's locks work in its own tests only")]
    fn the_corpora_are_taken() {
        baton_fuzz::replay("frames", frames);
        baton_fuzz::replay("layouts", layouts);
        baton_fuzz::replay("node", node);
        for length in 0..64 {
            [frames, layouts, node].iter().for_each(|target| target(&vec![b'B'; length]));
        }
    }

    /// Seeds that should make a plan do make one: the target looks at what it is meant to look at.
    #[test]
    fn layouts_are_planned_with() {
        let planned = |name: &str| {
            let seed = std::fs::read(baton_fuzz::folder("layouts").join(name)).expect("a seed");
            let wire = v1::KvLayout::decode(&seed[1..]).expect("a layout");
            let own = own_layout(seed[0] == 1);
            let peer = KvLayout { model_revision: "r1".into(), ..KvLayout::try_from(&wire).expect("sizes") };
            own.plan_from(&peer).map(|plan| plan.is_some())
        };
        assert_eq!(planned("equal"), Ok(false));
        for name in
            ["other-block", "uneven-block", "other-arrangement", "other-type", "latent", "latent-rows"]
        {
            assert_eq!(planned(name), Ok(true), "{name}");
        }
        for name in ["other-tp", "latent-for-heads"] {
            planned(name).expect_err(name);
        }
    }
}
