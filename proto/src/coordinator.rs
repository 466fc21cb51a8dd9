//! A coordinator as the controller and operators know it: what it is, how it is, the links that it uses; and their way to
//! and from the wire. Everything is checked and bounded here: it comes from another process and is kept.

use crate::{CoordinatorId, Incarnation, InstanceId, WireError, v1};

/// Most links that one coordinator tells of.
pub const LINKS_MOST: usize = 4096;

/// Most models that one coordinator serves.
pub const MODELS_MOST: usize = 64;
/// Most names that one model has.
pub const MODEL_NAMES_MOST: usize = 16;
/// Longest name of a model, in bytes.
pub const MODEL_NAME_BYTES_MOST: usize = 256;

/// Longest of the texts that describe a coordinator, in bytes.
const TEXT_MOST: usize = 300;

/// What a coordinator is; fixed for one incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoordinatorSpec {
    pub id: CoordinatorId,
    pub incarnation: Incarnation,
    /// host:port for clients; with https:// in front where they are served by TLS.
    pub http_endpoint: String,
    /// host:port of its RequestAdmin service; may be empty.
    pub admin_endpoint: String,
    /// Of the build.
    pub version: String,
    /// What it serves; at most [`MODELS_MOST`].
    pub models: Vec<ServedModel>,
}

/// A model that a coordinator serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// What requests may call it, and answers do by the first; at most [`MODEL_NAMES_MOST`], of
    /// [`MODEL_NAME_BYTES_MOST`] at most.
    pub names: Vec<String>,
    /// Of its checkpoint: instances that have the same run it.
    pub revision: String,
}

/// How a coordinator is. Counts are since its process started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CoordinatorBeat {
    /// That have ended, well or not.
    pub requests: u64,
    /// Of them, those that failed by no fault of the client.
    pub failures: u64,
    pub running: u32,
    pub queued: u32,
    pub draining: bool,
    /// The last one used first; at most [`LINKS_MOST`].
    pub links: Vec<LinkUse>,
    /// Whether `links` are all that it has used of late, not only those since the beat before.
    pub all_links: bool,
}

/// What went from one instance to another, as one coordinator or all of them saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkUse {
    pub prefill: InstanceId,
    pub decode: InstanceId,
    pub handoffs: u64,
    pub failures: u64,
    /// From the first token to decode's first, of late; 0 = not measured.
    pub mean_micros: u64,
}

fn short(value: String, field: &'static str) -> Result<String, WireError> {
    if value.len() <= TEXT_MOST { Ok(value) } else { Err(WireError::TooLong { field, most: TEXT_MOST }) }
}

impl TryFrom<v1::CoordinatorSpec> for CoordinatorSpec {
    type Error = WireError;
    fn try_from(wire: v1::CoordinatorSpec) -> Result<Self, WireError> {
        if wire.http_endpoint.is_empty() {
            return Err(WireError::Missing("http_endpoint"));
        }
        Ok(Self {
            id: CoordinatorId::new(wire.coordinator_id)?,
            incarnation: Incarnation(wire.incarnation),
            http_endpoint: short(wire.http_endpoint, "http_endpoint")?,
            admin_endpoint: short(wire.admin_endpoint, "admin_endpoint")?,
            version: short(wire.version, "version")?,
            models: models(wire.models)?,
        })
    }
}

impl From<CoordinatorSpec> for v1::CoordinatorSpec {
    fn from(spec: CoordinatorSpec) -> Self {
        Self {
            coordinator_id: spec.id.into(),
            incarnation: spec.incarnation.0,
            http_endpoint: spec.http_endpoint,
            admin_endpoint: spec.admin_endpoint,
            version: spec.version,
            models: spec.models.into_iter().map(v1::ServedModel::from).collect(),
        }
    }
}

fn models(wire: Vec<v1::ServedModel>) -> Result<Vec<ServedModel>, WireError> {
    if wire.len() > MODELS_MOST {
        return Err(WireError::TooLong { field: "models", most: MODELS_MOST });
    }
    wire.into_iter().map(ServedModel::try_from).collect()
}

impl TryFrom<v1::ServedModel> for ServedModel {
    type Error = WireError;
    fn try_from(wire: v1::ServedModel) -> Result<Self, WireError> {
        if wire.names.is_empty() {
            return Err(WireError::Missing("models.names"));
        }
        if wire.names.len() > MODEL_NAMES_MOST {
            return Err(WireError::TooLong { field: "models.names", most: MODEL_NAMES_MOST });
        }
        if wire.names.iter().any(|name| name.len() > MODEL_NAME_BYTES_MOST) {
            return Err(WireError::TooLong { field: "models.names", most: MODEL_NAME_BYTES_MOST });
        }
        Ok(Self { names: wire.names, revision: short(wire.revision, "models.revision")? })
    }
}

impl From<ServedModel> for v1::ServedModel {
    fn from(model: ServedModel) -> Self {
        Self { names: model.names, revision: model.revision }
    }
}

impl TryFrom<v1::CoordinatorBeat> for CoordinatorBeat {
    type Error = WireError;
    fn try_from(wire: v1::CoordinatorBeat) -> Result<Self, WireError> {
        if wire.links.len() > LINKS_MOST {
            return Err(WireError::TooLong { field: "links", most: LINKS_MOST });
        }
        Ok(Self {
            requests: wire.requests,
            failures: wire.failures,
            running: wire.running,
            queued: wire.queued,
            draining: wire.draining,
            links: wire.links.into_iter().map(LinkUse::try_from).collect::<Result<_, _>>()?,
            all_links: wire.all_links,
        })
    }
}

impl From<CoordinatorBeat> for v1::CoordinatorBeat {
    fn from(beat: CoordinatorBeat) -> Self {
        Self {
            requests: beat.requests,
            failures: beat.failures,
            running: beat.running,
            queued: beat.queued,
            draining: beat.draining,
            links: beat.links.into_iter().map(v1::LinkBeat::from).collect(),
            all_links: beat.all_links,
        }
    }
}

impl TryFrom<v1::LinkBeat> for LinkUse {
    type Error = WireError;
    fn try_from(wire: v1::LinkBeat) -> Result<Self, WireError> {
        Ok(Self {
            prefill: InstanceId::new(wire.prefill_instance)?,
            decode: InstanceId::new(wire.decode_instance)?,
            handoffs: wire.handoffs,
            failures: wire.failures,
            mean_micros: wire.mean_micros,
        })
    }
}

impl From<LinkUse> for v1::LinkBeat {
    fn from(link: LinkUse) -> Self {
        Self {
            prefill_instance: link.prefill.into(),
            decode_instance: link.decode.into(),
            handoffs: link.handoffs,
            failures: link.failures,
            mean_micros: link.mean_micros,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::CoordinatorSpec {
        v1::CoordinatorSpec {
            coordinator_id: "c".into(),
            incarnation: 7,
            http_endpoint: "h:1".into(),
            admin_endpoint: "h:2".into(),
            version: "1".into(),
            models: vec![model(2)],
        }
    }

    fn model(names: usize) -> v1::ServedModel {
        let names = (0..names).map(|n| format!("m{n}")).collect();
        v1::ServedModel { names, revision: "r".into() }
    }

    fn link(prefill: &str, decode: &str) -> v1::LinkBeat {
        v1::LinkBeat {
            prefill_instance: prefill.into(),
            decode_instance: decode.into(),
            handoffs: 3,
            failures: 1,
            mean_micros: 900,
        }
    }

    #[test]
    fn what_is_said_comes_back_as_it_was() {
        let taken = CoordinatorSpec::try_from(spec()).expect("is good");
        assert_eq!(v1::CoordinatorSpec::from(taken), spec());
        let beat = v1::CoordinatorBeat {
            requests: 9,
            failures: 2,
            running: 3,
            queued: 4,
            draining: true,
            links: vec![link("p", "d")],
            all_links: true,
        };
        let taken = CoordinatorBeat::try_from(beat.clone()).expect("is good");
        assert_eq!(v1::CoordinatorBeat::from(taken), beat);
    }

    #[test]
    fn what_could_not_be_kept_is_refused() {
        let cases: [fn(&mut v1::CoordinatorSpec); 9] = [
            |spec| spec.coordinator_id = "Not a name".into(),
            |spec| spec.http_endpoint.clear(),
            |spec| spec.admin_endpoint = "x".repeat(TEXT_MOST + 1),
            |spec| spec.version = "x".repeat(TEXT_MOST + 1),
            |spec| spec.models = vec![model(1); MODELS_MOST + 1],
            |spec| spec.models = vec![model(0)],
            |spec| spec.models = vec![model(MODEL_NAMES_MOST + 1)],
            |spec| spec.models[0].names[0] = "x".repeat(MODEL_NAME_BYTES_MOST + 1),
            |spec| spec.models[0].revision = "x".repeat(TEXT_MOST + 1),
        ];
        for (index, change) in cases.into_iter().enumerate() {
            let mut spec = spec();
            change(&mut spec);
            assert!(CoordinatorSpec::try_from(spec).is_err(), "case {index}");
        }
        let beat = |links| CoordinatorBeat::try_from(v1::CoordinatorBeat { links, ..Default::default() });
        assert!(beat(vec![link("p", "d"); LINKS_MOST]).is_ok());
        assert!(beat(vec![link("p", "d"); LINKS_MOST + 1]).is_err());
        assert!(beat(vec![link("p", "")]).is_err());
        assert!(beat(vec![link("P", "d")]).is_err());
    }
}
