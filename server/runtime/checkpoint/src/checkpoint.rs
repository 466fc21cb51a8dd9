//! The model as everyone sees it, whatever the format.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use sha2::{Digest, Sha256};

use crate::{
    BlockScales, CheckpointError, ModelConfig, ModelRoot, SuggestedSampling, TensorView, TokenizerSource,
    Weight, gguf, huggingface,
    parts::{Format, Parts, TensorEntry},
    source::{Extent, MappedFile},
    wanted,
};

/// What goes into [`Checkpoint::revision`], and in which order; to be changed with either.
const REVISION_FORMAT: &str = "baton model revision 1";

/// A model on disk: mapped, checked, not yet loaded. Cheap to open and to share.
///
/// The files must not be cut short while a `Checkpoint` of them lives: reading a mapped page that is gone ends the
/// process.
pub struct Checkpoint {
    root: ModelRoot,
    path: PathBuf,
    parts: Parts,
    revision: OnceLock<String>,
}

impl Checkpoint {
    /// Opens a GGUF file, or a directory with `config.json`, `tokenizer.json` and `*.safetensors`.
    ///
    /// Reads headers only. Afterwards every tensor that the configuration calls for is known to be there, whole, of a
    /// supported type and of the right shape.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_under(&ModelRoot::anywhere(), path)
    }

    /// The same, of files that all lie under `root`.
    pub fn open_under(root: &ModelRoot, path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let kind = std::fs::metadata(path).map_err(io)?.file_type();
        let parts = if kind.is_dir() {
            huggingface::read(root, path)?
        } else if kind.is_file() {
            gguf::read(root, path)?
        } else {
            let reason = "it is neither a file nor a directory".to_owned();
            return Err(CheckpointError::NotAModel { path: path.to_owned(), reason });
        };
        let checkpoint = Self { root: root.clone(), path: path.to_owned(), parts, revision: OnceLock::new() };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.parts.files.iter().map(MappedFile::path)
    }

    pub fn format(&self) -> Format {
        self.parts.format
    }

    pub fn config(&self) -> &ModelConfig {
        &self.parts.config
    }

    /// What clients say in `model` unless told otherwise: the directory's name, or the file's without its ending and
    /// quantisation (`SmolLM2-135M-Instruct` of `SmolLM2-135M-Instruct.Q4_1.gguf`).
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// Hex SHA-256 digest over what the files say of configuration and tokeniser, as they say it, the table of tensors
    /// and samples of every tensor's content. Equal for copies of a model, different for any two models in practice,
    /// and the same in every release that has this [`REVISION_FORMAT`]. The first call reads a few pages of every
    /// tensor; an error if a file cannot be read any more.
    pub fn revision(&self) -> Result<String, CheckpointError> {
        if let Some(known) = self.revision.get() {
            return Ok(known.clone());
        }
        let digest = self.digest()?;
        Ok(self.revision.get_or_init(|| digest).clone())
    }

    /// The tensor for `weight`. With tied embeddings [`Weight::Output`] is the embedding.
    ///
    /// An error only for weights the configuration does not call for, such as biases of a model without.
    pub fn tensor(&self, weight: Weight) -> Result<TensorView<'_>, CheckpointError> {
        let weight = if self.parts.config.tied_embeddings && weight == Weight::Output {
            Weight::Embedding
        } else {
            weight
        };
        let missing = || CheckpointError::NoTensor { path: self.path.clone(), tensor: weight.to_string() };
        self.parts.tensors.get(&weight).map(|entry| self.view(entry)).ok_or_else(missing)
    }

    /// Says that a tensor's bytes will not be needed soon, so that the mapped file and what was made of it need not be
    /// in memory both. Views of it stay valid.
    pub fn release(&self, weight: Weight) {
        if let Some(entry) = self.parts.tensors.get(&weight) {
            self.parts.files[entry.extent.file].release(&entry.extent);
        }
    }

    /// Every stored tensor, in the order of [`Weight`]; a tied output projection is not listed.
    pub fn tensors(&self) -> impl Iterator<Item = (Weight, TensorView<'_>)> {
        self.parts.tensors.iter().map(|(&weight, entry)| (weight, self.view(entry)))
    }

    /// Bytes of all stored tensors together, without their scales where those lie beside them.
    pub fn weight_bytes(&self) -> u64 {
        self.parts.tensors.values().map(|entry| entry.extent.length as u64).sum()
    }

    pub fn tokenizer(&self) -> &TokenizerSource {
        &self.parts.tokenizer
    }

    /// Jinja source of the chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.parts.chat_template.as_deref()
    }

    /// Text of the token that begins a sequence, for the chat template.
    pub fn bos_token(&self) -> Option<&str> {
        self.parts.bos_token.as_deref()
    }

    /// Text of the token that ends a sequence, for the chat template.
    pub fn eos_token(&self) -> Option<&str> {
        self.parts.eos_token.as_deref()
    }

    /// Tokens that end a generation, ascending. May be empty.
    pub fn stop_token_ids(&self) -> &[u32] {
        &self.parts.stop_token_ids
    }

    /// How its tokens are to be chosen where nobody says otherwise.
    pub fn sampling(&self) -> &SuggestedSampling {
        &self.parts.sampling
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> TensorView<'a> {
        let bytes = |extent: &Extent| self.parts.files[extent.file].bytes(extent);
        let scales = entry.scales.as_ref().map(|scales| BlockScales {
            block: scales.block,
            dtype: scales.dtype,
            bytes: bytes(&scales.extent),
        });
        TensorView { dtype: entry.dtype, shape: &entry.shape, bytes: bytes(&entry.extent), scales }
    }

    /// The file that a tensor lies in, for messages.
    fn file_of(&self, entry: &TensorEntry) -> PathBuf {
        self.parts.files[entry.extent.file].path().to_owned()
    }

    /// Checks the configuration, and that the tensors are those it calls for.
    fn check(&self) -> Result<(), CheckpointError> {
        let config = &self.parts.config;
        config.check().map_err(|(field, reason)| CheckpointError::Damaged {
            path: self.path.clone(),
            field: field.to_owned(),
            reason,
        })?;
        // Layer by layer: numbers in a file may call for more tensors than there is memory to list.
        let mut called_for = self.check_shapes(wanted::outside(config))?;
        for layer in 0..config.layers {
            called_for += self.check_shapes(wanted::of_layer(config, layer))?;
        }
        if called_for == self.parts.tensors.len() {
            return Ok(());
        }
        let layers = (0..config.layers).flat_map(|layer| wanted::of_layer(config, layer));
        let all = wanted::outside(config).into_iter().chain(layers);
        let wanted: BTreeSet<Weight> = all.map(|(weight, _)| weight).collect();
        match self.parts.tensors.iter().find(|(weight, _)| !wanted.contains(weight)) {
            Some((_, entry)) => Err(CheckpointError::Damaged {
                path: self.file_of(entry),
                field: format!("tensor {}", entry.name),
                reason: "the configuration does not call for it".to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Checks that these tensors are there, each of its shape; gives their number.
    fn check_shapes(&self, wanted: Vec<(Weight, Vec<usize>)>) -> Result<usize, CheckpointError> {
        for (weight, shape) in &wanted {
            let Some(entry) = self.parts.tensors.get(weight) else {
                return Err(CheckpointError::Damaged {
                    path: self.path.clone(),
                    field: format!("tensor for {weight}"),
                    reason: "the configuration calls for it, but it is not there".to_owned(),
                });
            };
            if &entry.shape != shape {
                return Err(CheckpointError::Damaged {
                    path: self.file_of(entry),
                    field: format!("tensor {}", entry.name),
                    reason: format!("its shape is {:?}, the configuration calls for {shape:?}", entry.shape),
                });
            }
        }
        Ok(wanted.len())
    }

    /// Over the files' own bytes and names: nothing in it depends on how this code represents a model.
    fn digest(&self) -> Result<String, CheckpointError> {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(REVISION_FORMAT.as_bytes());
        match &self.parts.tokenizer {
            TokenizerSource::HuggingFaceJson { file, .. } => {
                field(&self.root.read(&self.path.join("config.json"))?);
                field(&file.read()?);
            }
            // Both lie before the first tensor.
            TokenizerSource::Ggml(_) => {
                let first = self.parts.tensors.values().map(|entry| entry.extent.start).min();
                let head = self.parts.files.first().zip(first).map(|(file, first)| &file.all()[..first]);
                field(head.unwrap_or_default());
            }
        }
        let mut tensors: Vec<_> = self.parts.tensors.values().collect();
        // Several may be parts of one tensor of the file.
        tensors.sort_by_key(|entry| (&entry.name, entry.extent.start));
        for entry in tensors {
            let view = self.view(entry);
            field(entry.name.as_bytes());
            field(view.dtype.name().as_bytes());
            let shape: Vec<u8> = view.shape.iter().flat_map(|&axis| (axis as u64).to_le_bytes()).collect();
            field(&shape);
            sample(view.bytes, &mut field);
            if let Some(scales) = view.scales {
                sample(scales.bytes, &mut field);
            }
            // Around each page that is read the system maps others.
            self.parts.files[entry.extent.file].release(&entry.extent);
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("config", &self.parts.config).finish()
    }
}

/// Feeds up to 8 evenly spaced pieces of 512 bytes to `take`, first and last included; all of a short tensor.
fn sample(bytes: &[u8], mut take: impl FnMut(&[u8])) {
    const PIECE: usize = 512;
    const PIECES: usize = 8;
    if bytes.len() <= PIECE * PIECES {
        return take(bytes);
    }
    let last = bytes.len() - PIECE;
    for piece in 0..PIECES {
        // At most `last`; u128 because the product may not fit usize.
        let start = (last as u128 * piece as u128 / (PIECES as u128 - 1)) as usize;
        take(&bytes[start..start + PIECE]);
    }
}
