//! What is counted of those who come with API keys. Tenants are named by operators alone, never by requests.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::shown;

/// A tenant, by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabel {
    tenant: Arc<str>,
}

/// Whose request was refused for its key, and why; nobody's, if the key is not known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KeyRefusalLabels {
    pub tenant: Arc<str>,
    pub reason: &'static str,
}

/// All of it.
#[derive(Debug)]
pub struct KeyMetrics {
    pub refusals: Family<KeyRefusalLabels, Counter>,
    /// Keys in effect.
    pub known: Gauge,
    /// Coordinators that share what keys may, this one among them.
    pub sharers: Gauge,
    /// Times that keys could not be read anew.
    pub not_renewed: Counter,
    requests: Family<TenantLabel, Counter>,
    in_flight: Family<TenantLabel, Gauge>,
    prompt_tokens: Family<TenantLabel, Counter>,
    generation_tokens: Family<TenantLabel, Counter>,
}

/// Those of one tenant, looked up once.
#[derive(Debug)]
pub struct TenantMetrics {
    pub requests: Counter,
    pub in_flight: Gauge,
    pub prompt_tokens: Counter,
    pub generation_tokens: Counter,
}

impl KeyMetrics {
    pub(super) fn register(to: &mut Registry) -> Self {
        Self {
            refusals: shown(
                to,
                "api_key_refusals",
                "Requests refused for their API key, by whose it is, if it is known, and why",
            ),
            known: shown(to, "api_keys", "API keys in effect"),
            sharers: shown(
                to,
                "api_key_sharers",
                "Coordinators that share what API keys may: each grants its part",
            ),
            not_renewed: shown(
                to,
                "api_keys_not_renewed",
                "Times that API keys could not be read anew, so that those before stayed in effect",
            ),
            requests: shown(
                to,
                "tenant_requests",
                "Requests with an API key that were taken on, by whose it is",
            ),
            in_flight: shown(to, "tenant_in_flight", "Those of them that have not ended"),
            prompt_tokens: shown(to, "tenant_prompt_tokens", "Prompt tokens of their dispatched requests"),
            generation_tokens: shown(to, "tenant_generation_tokens", "Tokens generated for them"),
        }
    }

    /// Those of this tenant, which are shown from now on.
    pub fn of_tenant(&self, tenant: Arc<str>) -> TenantMetrics {
        let label = TenantLabel { tenant };
        TenantMetrics {
            requests: self.requests.get_or_create_owned(&label),
            in_flight: self.in_flight.get_or_create_owned(&label),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&label),
            generation_tokens: self.generation_tokens.get_or_create_owned(&label),
        }
    }

    /// This tenant is shown no more.
    pub fn forget(&self, tenant: &Arc<str>, reasons: &[&'static str]) {
        let label = TenantLabel { tenant: tenant.clone() };
        self.requests.remove(&label);
        self.in_flight.remove(&label);
        self.prompt_tokens.remove(&label);
        self.generation_tokens.remove(&label);
        for reason in reasons {
            self.refusals.remove(&KeyRefusalLabels { tenant: tenant.clone(), reason });
        }
    }
}
