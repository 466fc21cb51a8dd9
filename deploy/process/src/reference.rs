//! What a service says of its own configuration: a page for people (`--config-reference`) and a JSON Schema for editors
//! (`--config-schema`). Both are made of the types that read it: their doc comments are the meanings, their `Default` gives
//! the defaults, their schema what is accepted. Pure; called by [`crate::run`].

use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::{ConfigError, ServiceConfig, config};

/// Stands in keys for the name of an entry that people choose.
const ANY_NAME: &str = "NAME";
const MIB: f64 = (1 << 20) as f64;

/// Dotted keys and defaults (as JSON) of a configuration type, sorted.
pub fn keys<T: Serialize + Default>() -> Result<Vec<(String, String)>, ConfigError> {
    let mut keys = Vec::new();
    config::walk("", &config::shape::<T>()?, &mut |path, value| {
        if value.as_object().is_none_or(|table| table.is_empty()) {
            keys.push((path.to_owned(), default_of(value)));
        }
    });
    keys.sort();
    Ok(keys)
}

/// The JSON Schema of a configuration file. No part refers to another: a key has its own description wherever it is.
pub fn schema<T: ServiceConfig>(service: &str) -> Json {
    // The draft that editors of TOML know.
    let mut settings = SchemaSettings::draft07();
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    schema["title"] = json!(format!("baton-{service}"));
    without_defaults_of_tables(&mut schema);
    schema
}

/// The page, in Markdown: how the configuration is given, then a table of keys for each of its tables.
pub fn page<T: ServiceConfig>(service: &str) -> Result<String, ConfigError> {
    let schema = schema::<T>(service);
    let order = in_order(&config::render(&T::default())?);
    let mut sections = Vec::new();
    collect("", &schema, &config::shape::<T>()?, &order, &mut sections);
    let mut page = introduction(service, description(&schema), T::EXAMPLE);
    for Section { path, about, rows } in sections {
        if path.is_empty() {
            page += "\n## Top level\n";
        } else {
            page += &format!("\n## `{path}`\n\n{about}\n");
        }
        if rows.is_empty() {
            continue;
        }
        page += "\n| key | default | meaning |\n|---|---|---|\n";
        for Row { key, default, meaning } in rows {
            page += &format!("| `{key}` | {default} | {} |\n", meaning.replace('|', "\\|"));
        }
    }
    Ok(page)
}

fn introduction(service: &str, about: &str, example: &str) -> String {
    let variable = config::variable(service, "process.log.level");
    format!(
        "\
# Configuration of `baton-{service}`

{about}

A key has the value that the last of these gives it: its default, a TOML file (`--config FILE`), the environment, flags.
Unknown keys are errors that name the nearest known one. `--check-config` prints what is in effect, and starts nothing.

```sh
{variable}=debug baton-{service} --config {service}.toml --set process.log.format=json
```

With `baton up` it is `--set {service}.process.log.format=json`. A file to begin with:

```toml
{example}```

Durations are a whole number and a unit: `250ms`, `2s`, `1m`, `1h`. What ends in `_bytes` is a number of bytes. Addresses to listen
on are `HOST:PORT`, of which port 0 is any free one, or `fd://N`, a socket that whoever started the process had bound. In the
environment and in flags a list of words may be written `a,b`, any list or table as in TOML: `['a', 'b']`, `{{a = 1}}`.

`baton-{service} --config-reference` prints this page, `--config-schema` a JSON Schema by which editors complete and check a file.
"
    )
}

struct Section {
    path: String,
    about: String,
    rows: Vec<Row>,
}

struct Row {
    key: String,
    default: String,
    meaning: String,
}

/// Adds a section for the table at `path`, and after it those of the tables in it. `defaults`: what the table holds if
/// nobody says anything; null in entries of lists and maps, of which there are none then.
fn collect(path: &str, schema: &Json, defaults: &Json, order: &[String], sections: &mut Vec<Section>) {
    let fields = schema["properties"].as_object().into_iter().flatten();
    let mut fields: Vec<_> = fields.map(|(name, field)| (name, join(path, name), field)).collect();
    fields.sort_by_key(|(_, key, _)| position(order, key));
    let is_required = |name: &str| {
        schema["required"].as_array().is_some_and(|names| names.iter().any(|required| required == name))
    };
    let (mut rows, mut inner) = (Vec::new(), Vec::new());
    for (name, key, field) in fields {
        if is_table(field) {
            inner.push((key, field, &defaults[name]));
            continue;
        }
        let default = match defaults.get(name).or(field.get("default")) {
            Some(value) => format!("`{}`", default_of(value)),
            None if is_required(name) => "required".to_owned(),
            None => String::new(),
        };
        if is_table(&field["items"]) {
            inner.push((format!("{key}[]"), &field["items"], &Json::Null));
        }
        if is_table(&field["additionalProperties"]) {
            inner.push((join(&key, ANY_NAME), &field["additionalProperties"], &Json::Null));
        }
        let meaning = meaning(field, name.ends_with("_bytes"));
        rows.push(Row { key, default, meaning });
    }
    sections.push(Section { path: path.to_owned(), about: description(schema).to_owned(), rows });
    for (key, schema, defaults) in inner {
        collect(&key, schema, defaults, order, sections);
    }
}

/// Whether its keys are known, so that each has a meaning of its own.
fn is_table(schema: &Json) -> bool {
    schema["properties"].is_object()
}

fn description(schema: &Json) -> &str {
    schema["description"].as_str().unwrap_or_default()
}

fn default_of(value: &Json) -> String {
    if value.is_null() { String::new() } else { value.to_string() }
}

/// The doc comment on one line, and behind it what the type says of accepted values.
fn meaning(field: &Json, in_bytes: bool) -> String {
    let mut parts = vec![one_line(description(field))];
    for choice in field["oneOf"].as_array().into_iter().flatten() {
        let name = choice["const"].as_str().unwrap_or_default();
        parts.push(format!("`{name}`: {}", begins_small(&one_line(description(choice)))));
    }
    for (names, lead) in [(&field["enum"], "One of"), (&field["items"]["enum"], "Any of")] {
        let names = names.as_array().into_iter().flatten().filter_map(Json::as_str);
        let names: Vec<_> = names.filter(|name| !name.is_empty()).map(|name| format!("`{name}`")).collect();
        if !names.is_empty() {
            parts.push(format!("{lead} {}.", names.join(", ")));
        }
    }
    // What an unsigned type cannot be anyway goes without saying.
    let least = field["minimum"].as_f64().filter(|least| *least > 0.0 || field["maximum"].is_number());
    let number = |value: f64| match value / MIB {
        mib if in_bytes && mib >= 1.0 && mib.fract() == 0.0 => format!("{value} ({mib} MiB)"),
        _ => value.to_string(),
    };
    match (least.map(number), field["maximum"].as_f64().map(number)) {
        (Some(least), Some(most)) => parts.push(format!("{least} to {most}.")),
        (Some(least), None) => parts.push(format!("At least {least}.")),
        (None, Some(most)) => parts.push(format!("At most {most}.")),
        (None, None) => {}
    }
    if let Some(most) = field["maxItems"].as_u64() {
        parts.push(format!("At most {most} of them."));
    }
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A sentence as the second half of one. Words of capitals stay.
fn begins_small(sentence: &str) -> String {
    let mut letters = sentence.chars();
    match (letters.next(), letters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => sentence.to_owned(),
    }
}

/// A table's default is that of its keys, and each says its own.
fn without_defaults_of_tables(schema: &mut Json) {
    let Some(schema) = schema.as_object_mut() else { return };
    if let Some(Json::Object(fields)) = schema.get_mut("properties") {
        fields.values_mut().for_each(without_defaults_of_tables);
        schema.remove("default");
    }
}

/// Dotted keys and tables of a TOML document as it is printed: in the order in which the types declare them.
fn in_order(toml: &str) -> Vec<String> {
    let mut table = "";
    let mut keys = Vec::new();
    for line in toml.lines() {
        match line.strip_prefix('[').and_then(|header| header.strip_suffix(']')) {
            Some(header) => {
                table = header;
                keys.push(header.to_owned());
            }
            None => keys.extend(line.split_once(" = ").map(|(name, _)| join(table, name))),
        }
    }
    keys
}

/// Where the key comes, or the first key of the table.
fn position(order: &[String], key: &str) -> usize {
    let within =
        |other: &String| other.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    order.iter().position(within).unwrap_or(order.len())
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
