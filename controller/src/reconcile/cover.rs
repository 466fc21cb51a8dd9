//! Which phases a group serves now, by parties that understand each other's caches. Pure.

use baton_proto::{InstanceSpec, Role};

use crate::{fleet::Member, plan::compatible};

struct Party<'a> {
    like: &'a InstanceSpec,
    prefill: usize,
    decode: usize,
}

/// See the module.
pub(super) struct Cover<'a> {
    parties: Vec<Party<'a>>,
}

impl<'a> Cover<'a> {
    pub(super) fn of(group: &[&'a Member]) -> Self {
        let mut parties: Vec<Party<'a>> = Vec::new();
        for member in group.iter().filter(|member| member.is_serving()) {
            let (prefill, decode) = phases(member.beat.role);
            match parties.iter_mut().find(|party| compatible(party.like, &member.spec)) {
                Some(party) => {
                    (party.prefill, party.decode) = (party.prefill + prefill, party.decode + decode)
                }
                None => parties.push(Party { like: &member.spec, prefill, decode }),
            }
        }
        Self { parties }
    }

    /// Whether requests can be served while the member, which serves, changes to this role; always if they cannot be
    /// served now.
    pub(super) fn spares(&self, member: &Member, role: Role) -> bool {
        let (had, keeps) = (phases(member.beat.role), phases(role));
        let (prefill, decode) = (had.0.saturating_sub(keeps.0), had.1.saturating_sub(keeps.1));
        let after = |party: &Party<'_>| {
            let own = compatible(party.like, &member.spec);
            party.prefill > usize::from(own) * prefill && party.decode > usize::from(own) * decode
        };
        let now = |party: &Party<'_>| party.prefill > 0 && party.decode > 0;
        !self.parties.iter().any(now) || self.parties.iter().any(after)
    }
}

/// How much of prefill and of decode it serves.
fn phases(role: Role) -> (usize, usize) {
    match role {
        Role::None => (0, 0),
        Role::Prefill => (1, 0),
        Role::Decode => (0, 1),
        Role::Mixed => (1, 1),
    }
}
