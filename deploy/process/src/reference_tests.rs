//! What the page and the schema say of a small configuration.

use std::{collections::BTreeMap, num::NonZeroU32, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::*;
use crate::{Listen, ProcessConfig, duration};

const MOST: u32 = 9;

/// What a toy can be told.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Toy {
    /// Wheels a|b,
    /// or none.
    #[schemars(range(max = MOST))]
    wheels: u32,
    /// Colours.
    paint: Paint,
    /// Boxes.
    #[schemars(length(max = 3))]
    boxes: Vec<ToyBox>,
    /// By the name of a child.
    owners: BTreeMap<String, Owner>,
    process: ProcessConfig,
}

/// How it looks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Paint {
    /// Where it is shown.
    window: Listen,
    /// What it is painted.
    colour: Colour,
    /// How long it dries.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    dries: Duration,
    /// Of the tin.
    #[schemars(range(min = 4 << 20))]
    tin_bytes: u64,
    /// Coats.
    coats: NonZeroU32,
}

impl Default for Paint {
    fn default() -> Self {
        let (window, colour, dries) = (Listen::loopback(), Colour::Red, Duration::from_secs(60));
        Self { window, colour, dries, tin_bytes: 8 << 20, coats: NonZeroU32::MIN }
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Colour {
    /// Like fire.
    Red,
    /// RAL 5002.
    Blue,
}

/// Where it is kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct ToyBox {
    /// What is written on it.
    label: String,
}

/// Whose it is.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Owner {
    /// In years.
    age: u8,
    /// What the child likes.
    #[serde(default)]
    likes: Vec<String>,
}

impl ServiceConfig for Toy {
    const EXAMPLE: &'static str = "wheels = 4\n";

    fn process(&self) -> &ProcessConfig {
        &self.process
    }
}

/// The page from the first table on, up to those that every service has.
fn tables() -> String {
    let page = page::<Toy>("toy").expect("a page");
    let (before, tables) = page.split_once("\n## Top level\n").expect("tables");
    assert!(before.starts_with("# Configuration of `baton-toy`\n\nWhat a toy can be told.\n"), "{before}");
    assert!(before.contains("```toml\nwheels = 4\n```\n"), "{before}");
    assert!(before.contains("BATON_TOY__PROCESS__LOG__LEVEL=debug baton-toy --config toy.toml"), "{before}");
    let (tables, process) = tables.split_once("\n## `process`\n").expect("what every service has");
    assert!(process.contains("\n## `process.log`\n"), "{process}");
    tables.to_owned()
}

#[test]
fn a_page_has_a_table_for_each_table_in_the_order_of_declaration() {
    let expected = r#"
| key | default | meaning |
|---|---|---|
| `wheels` | `0` | Wheels a\|b, or none. 0 to 9. |
| `boxes` | `[]` | Boxes. At most 3 of them. |
| `owners` | `{}` | By the name of a child. |

## `boxes[]`

Where it is kept.

| key | default | meaning |
|---|---|---|
| `boxes[].label` | `""` | What is written on it. |

## `paint`

Colours.

| key | default | meaning |
|---|---|---|
| `paint.window` | `"127.0.0.1:0"` | Where it is shown. |
| `paint.colour` | `"red"` | What it is painted. `red`: like fire. `blue`: RAL 5002. |
| `paint.dries` | `"1m"` | How long it dries. |
| `paint.tin_bytes` | `8388608` | Of the tin. At least 4194304 (4 MiB). |
| `paint.coats` | `1` | Coats. At least 1. |

## `owners.NAME`

Whose it is.

| key | default | meaning |
|---|---|---|
| `owners.NAME.age` | required | In years. 0 to 255. |
| `owners.NAME.likes` | `[]` | What the child likes. |
"#;
    assert_eq!(tables(), expected);
}

#[test]
fn a_schema_says_each_default_once_and_refers_to_no_other_part() {
    let schema = schema::<Toy>("toy");
    assert_eq!(schema["title"], "baton-toy");
    assert_eq!(schema["additionalProperties"], false);
    let paint = &schema["properties"]["paint"];
    assert_eq!((&paint["default"], &paint["description"]), (&Json::Null, &json!("Colours.")));
    let dries = &paint["properties"]["dries"];
    assert_eq!((&dries["type"], &dries["default"]), (&json!("string"), &json!("1m")));
    let text = schema.to_string();
    assert!(!text.contains("$ref") && !text.contains("null"), "{text}");
}

#[test]
fn keys_are_those_that_hold_values() {
    let keys = keys::<Toy>().expect("keys");
    let holds = |key: &str, default: &str| keys.contains(&(key.to_owned(), default.to_owned()));
    assert!(holds("paint.dries", "\"1m\"") && holds("boxes", "[]") && holds("owners", "{}"), "{keys:?}");
    assert!(
        holds("process.shutdown.drain", "\"\"") && !keys.iter().any(|(key, _)| key == "paint"),
        "{keys:?}"
    );
}
