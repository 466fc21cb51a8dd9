//! The API keys in the store: listed, added and revoked for operators. Coordinators follow them by themselves.
//!
//! Nothing that the leading task plans depends on them, so that they go straight to the store, fenced as every write of
//! the leader is. Only their hashes come here: a key is made by whoever asks.

use baton_proto::{API_KEYS_MOST, ApiError, ApiKey, ApiKeyName, ErrorCode, v1};
use baton_registry::{
    Compare, Fenced, KeyRange, KeyValue, StoreError, Txn,
    keys::{self, Key},
    records,
};
use tonic::Status;
use tracing::warn;

use super::{AdminService, invalid};
use crate::{
    clock::unix_millis,
    journal::{News, NewsKind},
    session::not_leading,
};

/// Times that a write is tried whose conditions do not hold, although they did when they were looked at.
const TRIES: usize = 3;

fn unstored(error: &StoreError) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, error.to_string())
}

fn none_such(name: &ApiKeyName) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("no API key in the store is called {name}"))
}

impl AdminService {
    /// Those that can be read, by name.
    pub(super) async fn api_keys(&self) -> Result<Vec<ApiKey>, Status> {
        self.keeps_keys()?;
        if self.desk.inbox().is_none() {
            return Err(not_leading(&*self.store).await);
        }
        let items = self.stored(KeyRange::prefix(keys::API_KEYS)).await?;
        let read = |item: &KeyValue| match records::decode_api_key(&item.value) {
            Ok(key) => Some(key),
            Err(error) => {
                warn!(key = item.key, %error, "an API key in the state store cannot be read and is left out");
                None
            }
        };
        Ok(items.iter().filter_map(read).collect())
    }

    /// Errors: `AlreadyExists` for a name or a key that is there, `InvalidArgument` by field.
    pub(super) async fn add_api_key(&self, wire: v1::ApiKey, actor: &str) -> Result<(), Status> {
        let by = v1::ApiKey { created_by: actor.to_owned(), created_unix_millis: unix_millis(), ..wire };
        let key = ApiKey::try_from(by).map_err(|error| invalid("key", error))?;
        for _ in 0..TRIES {
            let others = self.api_keys().await?;
            if others.iter().any(|other| other.name == key.name) {
                let message = format!("an API key is called {} already: give it another name", key.name);
                return Err(ApiError::new(ErrorCode::AlreadyExists, message).into());
            }
            if let Some(other) = others.iter().find(|other| other.hash == key.hash) {
                let message = format!("this API key is there already, as {}", other.name);
                return Err(ApiError::new(ErrorCode::AlreadyExists, message).into());
            }
            if others.len() >= API_KEYS_MOST {
                let message =
                    format!("there are {API_KEYS_MOST} API keys, as many as can be: revoke some first");
                return Err(ApiError::new(ErrorCode::QueueFull, message).into());
            }
            let place = keys::api_key(&key.name);
            let put =
                Txn::new().when(Compare::absent(&place)).put(place, records::encode_api_key(&key), None);
            if self.write(put).await? {
                let message = format!("API key {} of tenant {}, {}", key.name, key.tenant, key.band.name());
                self.enter(NewsKind::ApiKeyAdded, message, actor);
                return Ok(());
            }
        }
        Err(busy())
    }

    /// Errors: `NotFound`.
    pub(super) async fn revoke_api_key(&self, name: String, actor: &str) -> Result<(), Status> {
        self.keeps_keys()?;
        let name = ApiKeyName::new(name).map_err(|error| invalid("name", error))?;
        let place = keys::api_key(&name);
        for _ in 0..TRIES {
            let items = self.stored(KeyRange::exact(&place)).await?;
            let item = items.first().ok_or_else(|| none_such(&name))?;
            let delete = Txn::new().when(Compare::mod_revision(&place, item.mod_revision)).delete(&place);
            if self.write(delete).await? {
                self.enter(NewsKind::ApiKeyRevoked, format!("API key {name}"), actor);
                return Ok(());
            }
        }
        Err(busy())
    }

    fn keeps_keys(&self) -> Result<(), ApiError> {
        if self.keeps_keys {
            return Ok(());
        }
        let message = "this controller embeds the state store and would forget API keys with its next restart: keep them in \
                       a file (api_keys.file of the coordinators), or the state in etcd";
        Err(ApiError::new(ErrorCode::Unsupported, message))
    }

    async fn stored(&self, range: KeyRange) -> Result<Vec<KeyValue>, ApiError> {
        let listing = self.store.range(range).await.map_err(|error| unstored(&error))?;
        Ok(listing.items.into_iter().filter(|item| matches!(Key::parse(&item.key), Key::ApiKey(_))).collect())
    }

    /// Whether it was made; not, if a condition of its own did not hold.
    async fn write(&self, txn: Txn) -> Result<bool, Status> {
        let Some(inbox) = self.desk.inbox() else { return Err(not_leading(&*self.store).await) };
        match inbox.leadership.txn(txn).await {
            Ok(Fenced::Applied(_)) => Ok(true),
            Ok(Fenced::Conflict) => Ok(false),
            Ok(Fenced::Deposed) => Err(not_leading(&*self.store).await),
            Err(error) => Err(unstored(&error).into()),
        }
    }

    fn enter(&self, kind: NewsKind, message: String, actor: &str) {
        self.journal.enter(News {
            kind,
            group: None,
            instance: None,
            message,
            actor: Some(actor.to_owned()),
        });
    }
}

fn busy() -> Status {
    ApiError::new(ErrorCode::Unavailable, "the API keys are being changed by others: try again").into()
}
