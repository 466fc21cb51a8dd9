//! The files of a directory that are JSON, field by field.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{CheckpointError, ModelRoot, Suggested};

/// The text of a file, if it is there.
pub(super) fn read_text(root: &ModelRoot, path: &Path) -> Result<Option<String>, CheckpointError> {
    let content = match root.read(path) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        content => content?,
    };
    String::from_utf8(content).map(Some).map_err(|_| CheckpointError::Damaged {
        path: path.to_owned(),
        field: "its content".to_owned(),
        reason: "it is not UTF-8".to_owned(),
    })
}

/// A JSON object and the file it came from, for typed access with good errors.
pub(super) struct JsonFile {
    path: PathBuf,
    value: Value,
}

impl JsonFile {
    /// `None` if the directory has no such file.
    pub(super) fn open(
        root: &ModelRoot,
        directory: &Path,
        name: &str,
    ) -> Result<Option<Self>, CheckpointError> {
        let path = directory.join(name);
        let Some(text) = read_text(root, &path)? else { return Ok(None) };
        let reason = match serde_json::from_str::<Value>(&text) {
            Ok(value @ Value::Object(_)) => return Ok(Some(Self { path, value })),
            Ok(_) => "it is not a JSON object".to_owned(),
            Err(error) => format!("it is not JSON: {error}"),
        };
        Err(CheckpointError::Damaged { path, field: "its content".to_owned(), reason })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The value at `field`, where `a.b` is `b` within `a`; null counts as absent.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        let value = field.split('.').try_fold(&self.value, |value, key| value.get(key))?;
        (!value.is_null()).then_some(value)
    }

    /// A number that must be there.
    pub(super) fn needed(&self, field: &str) -> Result<u32, CheckpointError> {
        self.u32(field)?.ok_or_else(|| self.damaged(field, "it is not there"))
    }

    pub(super) fn u32(&self, field: &str) -> Result<Option<u32>, CheckpointError> {
        self.read(field, "a 32-bit number", |value| value.as_u64().and_then(|n| n.try_into().ok()))
    }

    pub(super) fn f32(&self, field: &str) -> Result<Option<f32>, CheckpointError> {
        Ok(self.f64(field)?.map(|number| number as f32))
    }

    pub(super) fn f64(&self, field: &str) -> Result<Option<f64>, CheckpointError> {
        self.read(field, "a number", Value::as_f64)
    }

    /// A number that need not be one.
    pub(super) fn suggested(&self, field: &str) -> Option<Suggested> {
        self.get(field).map(|value| value.as_f64().ok_or_else(|| shown(value)))
    }

    pub(super) fn bool(&self, field: &str) -> Result<Option<bool>, CheckpointError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&str>, CheckpointError> {
        self.read(field, "text", Value::as_str)
    }

    fn read<'a, T>(
        &'a self,
        field: &str,
        kind: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong = || self.damaged(field, format!("{} is not {kind}", shown(value)));
        convert(value).ok_or_else(wrong).map(Some)
    }

    pub(super) fn damaged(&self, field: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), field: field.to_owned(), reason: reason.into() }
    }

    pub(super) fn unsupported(
        &self,
        field: &str,
        found: impl Into<String>,
        supported: &str,
    ) -> CheckpointError {
        CheckpointError::Unsupported {
            path: self.path.clone(),
            field: field.to_owned(),
            found: found.into(),
            supported: supported.to_owned(),
        }
    }
}

/// A value short enough for a message.
fn shown(value: &Value) -> String {
    value.to_string().chars().take(64).collect()
}
