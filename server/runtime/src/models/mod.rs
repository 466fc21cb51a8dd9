//! Model families, each written once over [`crate::device::Device`].

mod llama;

pub(crate) use llama::Llama;
