//! How one instance lays its KV cache out in memory, and whether two instances can exchange bytes.
//!
//! A cache is `[layer][block]`; one block of one layer, a *slice*, is contiguous and the unit that moves. Layouts are
//! compared field by field when a control stream opens. Where they differ, `plan` says whether the receiver can map the
//! one to the other as slices arrive; if not, the mismatch is refused with the field's name.

use std::fmt::Write as _;

use baton_proto::{KvLayoutSpec, v1};
use sha2::{Digest, Sha256};

use crate::TransferError;

/// The shape of a KV cache. Nodes whose fields are all equal exchange slices as they are.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KvLayout {
    /// Digest over the model's configuration and weights.
    pub model_revision: String,
    /// Arrangement within a slice. Those of the names `cpu-panel-16-columns`, `cpu-latent-16` (see
    /// [`SliceMap::cpu`](crate::plan::SliceMap::cpu)) and `token-major` can be mapped to each other.
    pub format: String,
    /// Element type, e.g. `f32`, `bf16`.
    pub dtype: String,
    /// Tokens in a block.
    pub block_tokens: u32,
    pub layers: u32,
    /// Of the whole model; 1 where all heads share one latent, which has no value beside it.
    pub kv_heads: u32,
    /// Elements of a key, and of a value; of a latent with its rotated part.
    pub head_dim: u32,
    /// Those of a latent that are its rotated part; 0 where there are keys and values.
    pub rope_dim: u32,
    /// Ranks that share the heads. Slices are mapped on their way between instances of one rank only.
    pub tensor_parallel: u32,
    /// Bytes of one block of one layer.
    pub slice_bytes: u64,
}

impl KvLayout {
    /// The largest slice and the most layers a peer may announce.
    const MAX_SLICE_BYTES: u64 = 1 << 30;
    const MAX_LAYERS: u32 = 4096;

    /// Checks the ranges that sizes are computed from.
    pub fn validate(&self) -> Result<(), TransferError> {
        let bad = |what: &str| Err(TransferError::Invalid(format!("KV layout: {what}")));
        if self.slice_bytes == 0 || self.slice_bytes > Self::MAX_SLICE_BYTES {
            return bad("slice_bytes must be 1 byte to 1 GiB");
        }
        if self.layers == 0 || self.layers > Self::MAX_LAYERS {
            return bad("layers must be 1 to 4096");
        }
        if self.block_tokens == 0 {
            return bad("block_tokens must be at least 1");
        }
        Ok(())
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Hex SHA-256 over every field in a fixed order, with lengths, so that no two layouts write the same text.
    pub fn fingerprint(&self) -> String {
        self.digest(|_| true)
    }

    /// The same over the fields that are wanted, by name.
    pub(crate) fn digest(&self, wanted: impl Fn(&str) -> bool) -> String {
        let mut hash = Sha256::new();
        for (name, value) in self.fields().into_iter().filter(|(name, _)| wanted(name)) {
            hash.update(format!("{name}:{}:{value};", value.len()));
        }
        hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// Whether bytes can be exchanged as they are; if not, the first field that differs.
    pub fn compatible_with(&self, peer: &KvLayout) -> Result<(), TransferError> {
        let differing = self.fields().into_iter().zip(peer.fields()).find(|(ours, theirs)| ours != theirs);
        match differing {
            None => Ok(()),
            Some(((field, ours), (_, theirs))) => Err(TransferError::LayoutMismatch { field, ours, theirs }),
        }
    }

    /// What a peer announces, of the same model. The wire carries the revision only within the fingerprint: that must be
    /// what this node's revision and the peer's other fields give.
    pub(crate) fn of_peer(&self, wire: &v1::KvLayout) -> Result<KvLayout, TransferError> {
        let mut peer = KvLayout::try_from(wire)?;
        peer.model_revision.clone_from(&self.model_revision);
        let ours = peer.fingerprint();
        if wire.fingerprint == ours {
            return Ok(peer);
        }
        let theirs = wire.fingerprint.chars().take(64).collect();
        Err(TransferError::LayoutMismatch { field: "model_revision (fingerprint)", ours, theirs })
    }

    /// The text of a field, by its name.
    pub(crate) fn field(&self, name: &str) -> String {
        let field = self.fields().into_iter().find(|(field, _)| *field == name);
        field.map_or_else(String::new, |(_, value)| value)
    }

    fn fields(&self) -> [(&'static str, String); 10] {
        [
            ("model_revision", self.model_revision.clone()),
            ("format", self.format.clone()),
            ("dtype", self.dtype.clone()),
            ("block_tokens", self.block_tokens.to_string()),
            ("layers", self.layers.to_string()),
            ("kv_heads", self.kv_heads.to_string()),
            ("head_dim", self.head_dim.to_string()),
            ("rope_dim", self.rope_dim.to_string()),
            ("tensor_parallel", self.tensor_parallel.to_string()),
            ("slice_bytes", self.slice_bytes.to_string()),
        ]
    }
}

impl From<&KvLayout> for KvLayoutSpec {
    fn from(layout: &KvLayout) -> Self {
        Self {
            fingerprint: layout.fingerprint(),
            class: layout.handover_class(),
            format: layout.format.clone(),
            dtype: layout.dtype.clone(),
            block_tokens: layout.block_tokens,
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            head_dim: layout.head_dim,
            rope_dim: layout.rope_dim,
            tensor_parallel: layout.tensor_parallel,
            block_bytes: layout.slice_bytes,
        }
    }
}

impl From<&KvLayout> for v1::KvLayout {
    fn from(layout: &KvLayout) -> Self {
        KvLayoutSpec::from(layout).into()
    }
}

/// Checks ranges. The wire has no revision of its own (it is in the fingerprint), so `model_revision` is empty.
impl TryFrom<&v1::KvLayout> for KvLayout {
    type Error = TransferError;

    fn try_from(wire: &v1::KvLayout) -> Result<Self, TransferError> {
        let layout = Self {
            model_revision: String::new(),
            format: wire.format.clone(),
            dtype: wire.dtype.clone(),
            block_tokens: wire.block_tokens,
            layers: wire.layers,
            kv_heads: wire.kv_heads,
            head_dim: wire.head_dim,
            rope_dim: wire.rope_dim,
            tensor_parallel: wire.tensor_parallel,
            slice_bytes: wire.block_bytes,
        };
        layout.validate()?;
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> KvLayout {
        KvLayout {
            model_revision: "r1".into(),
            format: "cpu-panel".into(),
            dtype: "f32".into(),
            block_tokens: 16,
            layers: 30,
            kv_heads: 3,
            head_dim: 64,
            rope_dim: 0,
            tensor_parallel: 1,
            slice_bytes: 24576,
        }
    }

    #[test]
    fn every_field_changes_the_fingerprint_and_is_named_when_it_differs() {
        let ours = layout();
        type Change = fn(&mut KvLayout);
        let changes: [(&str, Change); 10] = [
            ("model_revision", |l| l.model_revision = "r2".into()),
            ("format", |l| l.format = "x".into()),
            ("dtype", |l| l.dtype = "bf16".into()),
            ("block_tokens", |l| l.block_tokens = 32),
            ("layers", |l| l.layers = 31),
            ("kv_heads", |l| l.kv_heads = 4),
            ("head_dim", |l| l.head_dim = 128),
            ("rope_dim", |l| l.rope_dim = 32),
            ("tensor_parallel", |l| l.tensor_parallel = 2),
            ("slice_bytes", |l| l.slice_bytes = 1),
        ];
        for (name, change) in changes {
            let mut theirs = layout();
            change(&mut theirs);
            assert_ne!(ours.fingerprint(), theirs.fingerprint(), "{name}");
            let error = ours.compatible_with(&theirs).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
            match ours.of_peer(&v1::KvLayout::from(&theirs)) {
                Ok(peer) => assert_eq!(peer, theirs, "what the wire says"),
                Err(refused) => assert!(refused.to_string().contains("model_revision"), "{name}: {refused}"),
            }
        }
        assert_eq!(ours.compatible_with(&layout()), Ok(()));
        let same = ours.of_peer(&v1::KvLayout::from(&ours)).expect("the same");
        assert_eq!(same, ours);
        assert_eq!(ours.fingerprint().len(), 64);
    }

    #[test]
    fn neighbouring_fields_cannot_trade_characters() {
        let (mut a, mut b) = (layout(), layout());
        (a.format, a.dtype) = ("ab".into(), "c".into());
        (b.format, b.dtype) = ("a".into(), "bc".into());
        assert_ne!(a.fingerprint(), b.fingerprint());
    }

    #[test]
    fn absurd_sizes_from_the_wire_are_refused() {
        for change in [
            (|w: &mut v1::KvLayout| w.block_bytes = u64::MAX) as fn(&mut v1::KvLayout),
            |w| w.block_bytes = 0,
            |w| w.layers = 0,
            |w| w.layers = u32::MAX,
            |w| w.block_tokens = 0,
        ] {
            let mut wire = v1::KvLayout::from(&layout());
            change(&mut wire);
            assert!(KvLayout::try_from(&wire).is_err());
        }
    }
}
