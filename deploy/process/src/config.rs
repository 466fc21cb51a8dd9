//! One configuration out of four places: the type's defaults, then a TOML file, then the environment
//! (`BATON_<SERVICE>__A__B`, double underscores nest), then flags. Whatever is wrong is told in one line with the
//! place it came from, the dotted key and what was expected.

use std::{fs, path::Path};

use config::{Config, FileFormat, Value};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value as Json;

use crate::{ConfigError, nearest::nearest};

/// Loads a configuration for `service` ("controller", "coordinator", "server"). `overrides` are dotted paths and
/// values from the command line; later ones win.
pub fn load<T>(service: &str, file: Option<&Path>, overrides: &[(String, String)]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    load_from(file, &environment(service, std::env::vars()), overrides)
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

/// The environment variable that sets a key, and what all of them begin with.
pub(crate) fn variable(service: &str, key: &str) -> String {
    let nested = key.to_uppercase().replace('.', "__");
    format!("BATON_{}__{nested}", service.to_uppercase().replace('-', "_"))
}

fn environment(service: &str, variables: impl Iterator<Item = (String, String)>) -> Vec<Layer> {
    let prefix = variable(service, "");
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

    let text = file.map(read).transpose()?;
    // Text for a key whose default is empty may mean a number or a string; the type decides, by refusing one of them.
    let mut as_text = Vec::new();
    loop {
        let merged = merge(text.as_deref(), &layers, &shape, &as_text)?;
        let error = match serde_path_to_error::deserialize::<_, T>(&merged) {
            Ok(config) => return Ok(config),
            Err(error) => error,
        };
        let path = error.path().to_string();
        let retry = layers.iter().any(|layer| layer.key == path) && !as_text.contains(&path);
        if retry && at(&shape, &path).is_some_and(Json::is_null) {
            as_text.push(path);
            continue;
        }
        return Err(explain(&shape, file, &layers, &path, &error.into_inner().to_string()));
    }
}

/// File below variables below flags, as one tree.
fn merge(
    file: Option<&str>,
    layers: &[Layer],
    shape: &Json,
    as_text: &[String],
) -> Result<Json, ConfigError> {
    let mut builder = Config::builder();
    if let Some(text) = file {
        builder = builder.add_source(config::File::from_str(text, FileFormat::Toml));
    }
    for layer in layers {
        let value =
            if as_text.contains(&layer.key) { layer.value.as_str().into() } else { typed(shape, layer)? };
        builder = builder.set_override(&layer.key, value)?;
    }
    Ok(builder.build()?.try_deserialize()?)
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
pub(crate) fn shape<T: Serialize + Default>() -> Result<Json, ConfigError> {
    serde_json::to_value(T::default()).map_err(ConfigError::Shape)
}

pub(crate) fn walk(path: &str, value: &Json, visit: &mut impl FnMut(&str, &Json)) {
    if !path.is_empty() {
        visit(path, value);
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        walk(&path, value, visit);
    }
}

fn at<'a>(shape: &'a Json, key: &str) -> Option<&'a Json> {
    key.split('.').try_fold(shape, |value, part| value.get(part))
}

/// Text from a flag or variable as a value of the kind that the default has. Lists may be written `a,b` or as TOML; an
/// address of IPv6 begins as a TOML list does, and ends with a port.
fn typed(shape: &Json, layer: &Layer) -> Result<Value, ConfigError> {
    let (text, kind) = (layer.value.trim(), at(shape, &layer.key));
    let is_toml = text.starts_with('{') || (text.starts_with('[') && text.ends_with(']'));
    if is_toml && !matches!(kind, Some(Json::String(_))) {
        return toml_value(text).ok_or_else(|| ConfigError::BadValue {
            origin: layer.origin.clone(),
            key: layer.key.clone(),
            message: format!("`{text}` is not a TOML list or table"),
        });
    }
    match kind {
        Some(Json::Array(_)) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(items.map(Value::from).collect::<Vec<_>>().into())
        }
        // What does not parse stays text, and the type's own error says what it wanted.
        Some(Json::Number(_) | Json::Bool(_) | Json::Null) => {
            Ok(toml_value(text).unwrap_or_else(|| layer.value.as_str().into()))
        }
        _ => Ok(layer.value.as_str().into()),
    }
}

fn toml_value(text: &str) -> Option<Value> {
    let source = config::File::from_str(&format!("value = {text}"), FileFormat::Toml);
    Config::builder().add_source(source).build().and_then(|parsed| parsed.get("value")).ok()
}

fn explain(shape: &Json, file: Option<&Path>, layers: &[Layer], path: &str, message: &str) -> ConfigError {
    let origin = origin(file, layers, path);
    if message.starts_with("unknown field") {
        let mut known = Vec::new();
        walk("", shape, &mut |key, _| known.push(key.to_owned()));
        // The default of a list has no items, whose keys would be seen in it; the error names them.
        if let (Some((item, _)), Some((_, expected))) =
            (path.rsplit_once('.'), message.split_once("expected"))
        {
            let names = expected.split('`').skip(1).step_by(2);
            known.extend(names.map(|name| format!("{item}.{name}")));
        }
        let nearest = nearest(path, known.iter().map(String::as_str)).map(str::to_owned);
        return ConfigError::UnknownKey { origin, key: path.to_owned(), nearest };
    }
    ConfigError::BadValue { origin, key: path.to_owned(), message: message.to_owned() }
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
