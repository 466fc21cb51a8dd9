//! `key`: API keys for the coordinators. They are made here, from 256 random bits, and shown once: what goes to the
//! controller, or into a file, is their SHA-256.

use std::{num::NonZeroU32, time::Duration};

use baton_process::duration;
use baton_proto::{
    ApiKey, ApiKeyName, Band, KeyHash, KeyLimits, TenantName,
    v1::{self, AddApiKeyRequest, ListApiKeysRequest, RevokeApiKeyRequest},
};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{
    error::CtlError,
    fleet::{Client, Fleet},
    output::{Column, Output, Row, Table},
    words::{now_unix_millis, since, time},
};
use crate::screen::{complain, say};

/// Before every key, so that people and scanners of secrets see what it is.
const PREFIX: &str = "sk-baton-";

#[derive(Debug, Clone, Subcommand)]
pub(super) enum KeyCommand {
    /// Make a key and add it to etcd. The key is printed, this once.
    #[command(after_help = "\
For coordinators with `api_keys.store`. Only the key's SHA-256 leaves this command. To take one key's place \
with another, add a second one for the same tenant, have clients use it, and revoke the first.

Examples:
  baton ctl key add alice-2027 --tenant alice --requests-per-minute 600 --tokens-per-minute 200000
  KEY=$(baton ctl key add nightly --band batch --concurrent 32 --expires-in 2160h)")]
    Add(KeyArgs),

    /// Make a key for a file of keys: its table goes to standard output, the key to standard error.
    #[command(after_help = "\
For coordinators with `api_keys.file`. Nobody is asked.

Examples:
  baton ctl key generate alice-2027 --tenant alice --requests-per-minute 600 >> keys.toml")]
    Generate(KeyArgs),

    /// The keys in etcd, and what each may.
    List {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,

        /// Without the line of headers.
        #[arg(long)]
        no_headers: bool,
    },

    /// Let nobody in by a key any more. What runs with it goes on.
    Revoke {
        /// The key's name.
        name: String,
    },
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct KeyArgs {
    /// What the key is called, in metrics, logs and here: a-z, 0-9, '-' and '.'.
    name: ApiKeyName,

    /// Whose it is [default: as the key is called].
    #[arg(long)]
    tenant: Option<TenantName>,

    /// Requests a minute at most, at all coordinators together [default: no limit].
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,

    /// Tokens a minute at most, of prompts and completions together [default: no limit].
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<NonZeroU32>,

    /// Requests at a time at most [default: no limit].
    #[arg(long, value_name = "N")]
    concurrent: Option<NonZeroU32>,

    /// Whose requests come first.
    #[arg(long, value_enum, default_value_t = BandName::Standard)]
    band: BandName,

    /// Of the tenant among those of its band.
    #[arg(long, value_name = "N", default_value_t = ApiKey::WEIGHT)]
    weight: NonZeroU32,

    /// For how long it is good, as in 2160h [default: for ever].
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    expires_in: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BandName {
    Interactive,
    Standard,
    Batch,
}

impl KeyArgs {
    /// A new key and what is known of it.
    fn make(self, now_unix_millis: u64) -> (String, ApiKey) {
        let random: [u8; 32] = rand::random();
        let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let secret = format!("{PREFIX}{hex}");
        let band = match self.band {
            BandName::Interactive => Band::Interactive,
            BandName::Standard => Band::Standard,
            BandName::Batch => Band::Batch,
        };
        let key = ApiKey {
            tenant: self.tenant.unwrap_or_else(|| TenantName::from(&self.name)),
            hash: KeyHash::of(&secret),
            limits: KeyLimits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                concurrent: self.concurrent,
            },
            band,
            weight: self.weight,
            expires_unix_seconds: self
                .expires_in
                .map(|expires_in| (now_unix_millis / 1000).saturating_add(expires_in.as_secs())),
            created_by: String::new(),
            created_unix_millis: 0,
            name: self.name,
        };
        (secret, key)
    }
}

/// Makes a key for a file.
pub(super) fn generate(args: KeyArgs) {
    let (secret, key) = args.make(now_unix_millis());
    say(&table_of(&key));
    complain(&format!("the key, shown this once: {secret}"));
}

pub(super) async fn run(command: KeyCommand, fleet: &mut Fleet) -> Result<(), CtlError> {
    match command {
        KeyCommand::Generate(args) => generate(args),
        KeyCommand::Add(args) => {
            let (secret, key) = args.make(now_unix_millis());
            let name = key.name.clone();
            let call = |mut client: Client, question| async move { client.add_api_key(question).await };
            fleet.ask(AddApiKeyRequest { key: Some(key.into()) }, call).await?;
            say(&secret);
            complain(&format!("API key {name} is in effect; it is shown this once"));
        }
        KeyCommand::List { output, no_headers } => {
            let call = |mut client: Client, question| async move { client.list_api_keys(question).await };
            let keys = fleet.ask(ListApiKeysRequest {}, call).await?.keys;
            let table = table(&keys, now_unix_millis());
            let text = table.text(output, !no_headers, false);
            if table.rows.is_empty() && matches!(output, Output::Table | Output::Wide) {
                complain(&text);
            } else {
                say(&text);
            }
        }
        KeyCommand::Revoke { name } => {
            let call = |mut client: Client, question| async move { client.revoke_api_key(question).await };
            fleet.ask(RevokeApiKeyRequest { name: name.clone() }, call).await?;
            say(&format!("API key {name} is revoked"));
        }
    }
    Ok(())
}

/// As it stands in a file of keys.
fn table_of(key: &ApiKey) -> String {
    let mut lines = vec![
        "[[keys]]".to_owned(),
        format!("name = \"{}\"", key.name),
        format!("tenant = \"{}\"", key.tenant),
        format!("sha256 = \"{}\"", key.hash.to_hex()),
    ];
    let limits = [
        ("requests_per_minute", key.limits.requests_per_minute),
        ("tokens_per_minute", key.limits.tokens_per_minute),
        ("concurrent", key.limits.concurrent),
    ];
    lines.extend(limits.iter().filter_map(|(name, limit)| Some(format!("{name} = {}", (*limit)?))));
    lines.push(format!("band = \"{}\"", key.band.name()));
    lines.push(format!("weight = {}", key.weight));
    lines.extend(key.expires_unix_seconds.map(|end| format!("expires = {}", time(end.saturating_mul(1000)))));
    lines.join("\n") + "\n"
}

const COLUMNS: &[Column] = &[
    Column::new("KEY"),
    Column::new("TENANT"),
    Column::new("BAND"),
    Column::new("WEIGHT"),
    Column::new("REQUESTS/MIN"),
    Column::new("TOKENS/MIN"),
    Column::new("CONCURRENT"),
    Column::new("EXPIRES"),
    Column::wide("SHA256"),
    Column::wide("ADDED BY"),
    Column::wide("AGE"),
];
/// Digits of a hash that tell one from another.
const DIGITS: usize = 12;

fn table(keys: &[v1::ApiKey], now: u64) -> Table {
    Table {
        kind: "API key",
        nothing: "there are no API keys in the state store",
        columns: COLUMNS,
        rows: keys.iter().map(|key| row(key, now)).collect(),
    }
}

fn row(key: &v1::ApiKey, now: u64) -> Row {
    let limit = |limit: u32| if limit == 0 { "-".to_owned() } else { limit.to_string() };
    let hash: String = key.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let cells = vec![
        key.name.clone(),
        key.tenant.clone(),
        band(key).to_owned(),
        key.weight.to_string(),
        limit(key.requests_per_minute),
        limit(key.tokens_per_minute),
        limit(key.concurrent),
        time(key.expires_unix_seconds.saturating_mul(1000)),
        hash.chars().take(DIGITS).collect(),
        key.created_by.clone(),
        since(key.created_unix_millis, now),
    ];
    Row { key: key.name.clone(), names: vec![key.name.clone()], cells, object: object(key, &hash) }
}

fn band(key: &v1::ApiKey) -> &'static str {
    match v1::Band::try_from(key.band) {
        Ok(v1::Band::Unspecified | v1::Band::Standard) => Band::Standard.name(),
        Ok(v1::Band::Interactive) => Band::Interactive.name(),
        Ok(v1::Band::Batch) => Band::Batch.name(),
        Err(_) => "unknown",
    }
}

fn object(key: &v1::ApiKey, hash: &str) -> Value {
    json!({
        "name": key.name,
        "tenant": key.tenant,
        "sha256": hash,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "concurrent": key.concurrent,
        "band": band(key),
        "weight": key.weight,
        "expires_unix_seconds": key.expires_unix_seconds,
        "created_by": key.created_by,
        "created_unix_millis": key.created_unix_millis,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> KeyArgs {
        KeyArgs {
            name: ApiKeyName::new("alice-1").unwrap(),
            tenant: None,
            requests_per_minute: NonZeroU32::new(60),
            tokens_per_minute: None,
            concurrent: None,
            band: BandName::Batch,
            weight: ApiKey::WEIGHT,
            expires_in: Some(Duration::from_secs(3600)),
        }
    }

    #[test]
    fn each_key_is_another_and_its_hash_is_what_is_known_of_it() {
        let ((first, key), (second, _)) = (args().make(0), args().make(0));
        assert_eq!(first.len(), PREFIX.len() + 64);
        assert_ne!(first, second);
        assert_eq!(key.hash, KeyHash::of(&first));
        assert_eq!(key.expires_unix_seconds, Some(3600));
    }

    #[test]
    fn a_file_is_told_all_but_the_key() {
        let (secret, key) = args().make(1_800_000_000_000);
        let text = table_of(&key);
        assert!(!text.contains(&secret[PREFIX.len()..]));
        let hash = KeyHash::of(&secret).to_hex();
        let expected = format!(
            "[[keys]]\nname = \"alice-1\"\ntenant = \"alice-1\"\nsha256 = \"{hash}\"\nrequests_per_minute = 60\nband = \
             \"batch\"\nweight = 1\nexpires = 2027-01-15T09:00:00Z\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn a_list_says_what_each_may() {
        let (_, key) = args().make(1_800_000_000_000);
        let table = table(&[v1::ApiKey { created_by: "bob".into(), ..key.into() }], 0);
        let cells = &table.rows[0].cells;
        assert_eq!(cells[..8], ["alice-1", "alice-1", "batch", "1", "60", "-", "-", "2027-01-15T09:00:00Z"]);
        assert_eq!((cells[8].len(), cells[9].as_str()), (DIGITS, "bob"));
        assert_eq!(table.rows[0].object["sha256"].as_str().map(str::len), Some(64));
    }
}
