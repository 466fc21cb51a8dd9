//! One configuration out of four places: the type's defaults, then a TOML file, then the environment
//! (`BATON_<SERVICE>__A__B`, double underscores nest), then flags. Whatever is wrong is told in one line with the
//! place it came from, the dotted key and what was expected.

use std::{fs, path::Path};

use config::{Config, FileFormat, Value, ValueKind};
use serde::{Serialize, de::DeserializeOwned};

use crate::{ConfigError, nearest::nearest};

/// Loads a configuration for `service` ("controller", "coordinator", "server"). `overrides` are dotted paths and
/// values from the command line; later ones win.
pub fn load<T>(service: &str, file: Option<&Path>, overrides: &[(String, String)]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    load_from(file, &environment(service, std::env::vars()), overrides)
}

/// Dotted keys and defaults of a configuration type, in order; what the reference page lists.
pub fn reference<T: Serialize + Default>() -> Result<Vec<(String, String)>, ConfigError> {
    let mut keys = Vec::new();
    walk("", &shape::<T>()?, &mut |path, value| {
        if !matches!(value.kind, ValueKind::Table(_)) {
            let shown = match &value.kind {
                ValueKind::Nil => String::new(),
                ValueKind::String(text) => format!("{text:?}"),
                _ => value.to_string(),
            };
            keys.push((path.to_owned(), shown));
        }
    });
    keys.sort();
    Ok(keys)
}

/// The configuration as TOML, as `--check-config` prints it.
pub fn render<T: Serialize>(config: &T) -> Result<String, ConfigError> {
    Ok(toml::to_string_pretty(config)?)
}

/// Splits `KEY=VALUE` arguments of `--set`.
pub fn parse_set(arguments: &[String]) -> Result<Vec<(String, String)>, ConfigError> {
    let split = |argument: &String| match argument.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err(ConfigError::BadOverride { argument: argument.clone() }),
    };
    arguments.iter().map(split).collect()
}

/// One value that does not come from the file, and where it does come from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layer {
    key: String,
    value: String,
    origin: String,
}

fn environment(service: &str, variables: impl Iterator<Item = (String, String)>) -> Vec<Layer> {
    let prefix = format!("BATON_{}__", service.to_uppercase().replace('-', "_"));
    let mut layers: Vec<Layer> = variables
        .filter_map(|(name, value)| {
            let key = name.strip_prefix(&prefix)?.to_lowercase().replace("__", ".");
            Some(Layer { key, value, origin: format!("environment variable {name}") })
        })
        .collect();
    layers.sort_by(|a, b| a.key.cmp(&b.key));
    layers
}

fn load_from<T>(
    file: Option<&Path>,
    environment: &[Layer],
    flags: &[(String, String)],
) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let shape = shape::<T>()?;
    let flags = flags.iter().map(|(key, value)| Layer {
        key: key.clone(),
        value: value.clone(),
        origin: format!("command line ({key})"),
    });
    let layers: Vec<Layer> = environment.iter().cloned().chain(flags).collect();

    let mut builder = Config::builder();
    if let Some(path) = file {
        builder = builder.add_source(config::File::from_str(&read(path)?, FileFormat::Toml));
    }
    for layer in &layers {
        builder = builder.set_override(&layer.key, typed(&shape, layer)?)?;
    }
    let merged = builder.build()?;
    serde_path_to_error::deserialize(merged).map_err(|error| {
        let path = error.path().to_string();
        explain(&shape, file, &layers, &path, &error.into_inner())
    })
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let text =
        fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    match toml::from_str::<toml::Table>(&text) {
        Ok(_) => Ok(text),
        Err(error) => {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            Err(ConfigError::Syntax { path: path.to_owned(), line, message })
        }
    }
}

/// The type's default as a tree: which keys there are, and what kind of value each holds.
fn shape<T: Serialize + Default>() -> Result<Value, ConfigError> {
    Ok(Config::try_from(&T::default())?.try_deserialize()?)
}

fn walk(path: &str, value: &Value, visit: &mut impl FnMut(&str, &Value)) {
    if !path.is_empty() {
        visit(path, value);
    }
    if let ValueKind::Table(table) = &value.kind {
        for (key, value) in table {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            walk(&path, value, visit);
        }
    }
}

fn at<'a>(shape: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(shape, |value, part| match &value.kind {
        ValueKind::Table(table) => table.get(part),
        _ => None,
    })
}

/// Text from a flag or variable as a value. Lists may be written `a,b` or as TOML; scalars are converted when the
/// configuration is read, because only its type knows what they should be.
fn typed(shape: &Value, layer: &Layer) -> Result<Value, ConfigError> {
    let text = layer.value.trim();
    if text.starts_with('[') || text.starts_with('{') {
        let wrapped = config::File::from_str(&format!("value = {text}"), FileFormat::Toml);
        let parsed = Config::builder().add_source(wrapped).build().and_then(|parsed| parsed.get("value"));
        return parsed.map_err(|_| ConfigError::BadValue {
            origin: layer.origin.clone(),
            key: layer.key.clone(),
            message: format!("`{text}` is not a TOML list or table"),
        });
    }
    let is_list = at(shape, &layer.key).is_some_and(|value| matches!(value.kind, ValueKind::Array(_)));
    if is_list {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let items = items.map(|item| Value::new(None, item)).collect::<Vec<_>>();
        return Ok(Value::new(None, ValueKind::Array(items)));
    }
    Ok(Value::new(None, layer.value.as_str()))
}

fn explain(
    shape: &Value,
    file: Option<&Path>,
    layers: &[Layer],
    path: &str,
    error: &config::ConfigError,
) -> ConfigError {
    let origin = origin(file, layers, path);
    let message = error.to_string();
    if message.starts_with("unknown field") {
        let mut known = Vec::new();
        walk("", shape, &mut |key, _| known.push(key.to_owned()));
        let nearest = nearest(path, known.iter().map(String::as_str)).map(str::to_owned);
        return ConfigError::UnknownKey { origin, key: path.to_owned(), nearest };
    }
    // The library adds the key and the origin again; ours are exact.
    let message = match error {
        config::ConfigError::Type { unexpected, expected, .. } => {
            format!("expected {expected}, not {unexpected}")
        }
        _ => message.split(" for key `").next().unwrap_or(&message).to_owned(),
    };
    ConfigError::BadValue { origin, key: path.to_owned(), message }
}

/// Who set `path`: the last flag or variable at, above or below it, or else the file.
pub(crate) fn origin_of(
    service: &str,
    file: Option<&Path>,
    flags: &[(String, String)],
    path: &str,
) -> String {
    let flags = flags.iter().map(|(key, value)| Layer {
        key: key.clone(),
        value: value.clone(),
        origin: format!("command line ({key})"),
    });
    let layers: Vec<Layer> = environment(service, std::env::vars()).into_iter().chain(flags).collect();
    origin(file, &layers, path)
}

fn origin(file: Option<&Path>, layers: &[Layer], path: &str) -> String {
    let related = |key: &str| {
        key == path
            || key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))
            || path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.') || rest.starts_with('['))
    };
    match (layers.iter().rev().find(|layer| related(&layer.key)), file) {
        (Some(layer), _) => layer.origin.clone(),
        (None, Some(file)) => format!("config file {}", file.display()),
        (None, None) => "configuration".to_owned(),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
