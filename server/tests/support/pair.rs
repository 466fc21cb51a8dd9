//! Two instances that hand caches over, and a coordinator that asks both.

use baton_proto::{TransferId, v1};
use baton_server::role::Role;

use super::{Attached, Instance, Request, Shape};

/// Both halves of a handoff from one instance to another.
pub fn apart(prefill: &Instance, decode: &Instance) -> (v1::dispatch::Work, v1::dispatch::Work) {
    let transfer_id: Vec<u8> = TransferId::generate().as_bytes().to_vec();
    let to = v1::dispatch::Prefill {
        transfer_id: transfer_id.clone().into(),
        decode_instance: decode.id.clone(),
        decode_incarnation: decode.incarnation,
        decode_handoff_endpoint: decode.endpoint.clone(),
        hand_on: false,
    };
    let from = v1::dispatch::Decode {
        transfer_id: transfer_id.into(),
        prefill_instance: prefill.id.clone(),
        prefill_incarnation: prefill.incarnation,
    };
    (v1::dispatch::Work::Prefill(to), v1::dispatch::Work::Decode(from))
}

/// The same, where the first drains and is to hand on what it has.
pub fn handed_on(from: &Instance, to: &Instance) -> (v1::dispatch::Work, v1::dispatch::Work) {
    let (mut prefill, decode) = apart(from, to);
    if let v1::dispatch::Work::Prefill(work) = &mut prefill {
        work.hand_on = true;
    }
    (prefill, decode)
}

/// A prefill and a decode instance with a coordinator attached to both.
pub struct Pair {
    pub prefill: Instance,
    pub decode: Instance,
    pub to_prefill: Attached,
    pub to_decode: Attached,
}

impl Pair {
    pub async fn start(prefill: Shape, decode: Shape) -> Self {
        let prefill = Instance::start("p", Role::Prefill, prefill).await;
        let decode = Instance::start("d", Role::Decode, decode).await;
        let (to_prefill, to_decode) = (Attached::to(&prefill).await, Attached::to(&decode).await);
        Self { prefill, decode, to_prefill, to_decode }
    }

    /// Dispatches both legs under one number.
    pub async fn dispatch(&self, leg: u64, request: &Request) {
        let (prefill, decode) = apart(&self.prefill, &self.decode);
        self.to_prefill.dispatch(leg, request, prefill).await;
        self.to_decode.dispatch(leg, request, decode).await;
    }

    /// The whole completion.
    pub async fn completion(&mut self, leg: u64) -> Vec<u32> {
        let first = self.to_prefill.until_end(leg).await;
        assert_eq!(first.finished(), v1::FinishReason::HandedOff);
        assert_eq!((first.first_position, first.tokens.len()), (Some(0), 1));
        let rest = self.to_decode.until_end(leg).await;
        assert_eq!(rest.first_position, Some(1));
        rest.finished();
        [first.tokens, rest.tokens].concat()
    }

    pub async fn until_idle(&mut self) {
        self.prefill.until_idle().await;
        self.decode.until_idle().await;
    }
}
