//! Whose fault a failure is taken to be.

use std::time::Duration;

use baton_proto::ErrorCode;

use super::*;

fn breakers() -> Breakers {
    Breakers::new(&baton_process::Metrics::new("coordinator").register(Metrics::register))
}

fn ids<const N: usize>(names: [&str; N]) -> [InstanceId; N] {
    names.map(|name| InstanceId::new(name).expect("a good id"))
}

impl Breakers {
    fn is_closed(&self, instance: &InstanceId) -> bool {
        self.known.lock().get(instance).is_none_or(|of| of.breaker.is_closed())
    }
}

#[test]
fn a_handoff_that_fails_is_the_fault_of_whoever_it_fails_with_others_too() {
    let [p, q, d, e] = ids(["p", "q", "d", "e"]);
    let now = Instant::now();
    for code in [ErrorCode::HandoffFailed, ErrorCode::KvDamaged] {
        let fails = |breakers: &Breakers, prefill, decode, reporter| {
            let attempt = Attempt { placed: now, pair: Pair { prefill, decode: Some(decode) } };
            breakers.fault(attempt, reporter, &ApiError::new(code, ""), now);
        };
        let one_pair = breakers();
        (0..20).for_each(|_| fails(&one_pair, &p, &d, &d));
        assert!([&p, &d].iter().all(|id| one_pair.is_closed(id)), "it may be what lies between them");
        // Whoever says so.
        let bad_prefill = breakers();
        for _ in 0..3 {
            fails(&bad_prefill, &p, &d, &d);
            fails(&bad_prefill, &p, &e, &e);
        }
        assert!(!bad_prefill.is_closed(&p) && bad_prefill.is_closed(&d) && bad_prefill.is_closed(&e));
        let bad_decode = breakers();
        for _ in 0..3 {
            fails(&bad_decode, &p, &d, &p);
            fails(&bad_decode, &q, &d, &q);
        }
        assert!(bad_decode.is_closed(&p) && bad_decode.is_closed(&q) && !bad_decode.is_closed(&d));
    }
}

#[test]
fn what_an_instance_fails_alone_is_its_own_fault() {
    let [p, d] = ids(["p", "d"]);
    let now = Instant::now();
    for (decode, code) in [(Some(&d), ErrorCode::Internal), (None, ErrorCode::HandoffFailed)] {
        let breakers = breakers();
        let attempt = Attempt { placed: now, pair: Pair { prefill: &p, decode } };
        (0..5).for_each(|_| breakers.fault(attempt, &p, &ApiError::new(code, ""), now));
        assert!(!breakers.is_closed(&p) && breakers.is_closed(&d), "{code:?}");
    }
}

/// However often it is said of whom.
#[test]
fn those_that_are_stuck_are_counted_once_until_they_serve_again() {
    let (breakers, [a, b], now) = (Arc::new(breakers()), ids(["a", "b"]), Instant::now());
    for _ in 0..3 {
        breakers.stuck(&a, now);
        breakers.stuck(&b, now);
    }
    assert_eq!((breakers.open.get(), breakers.openings.get()), (2, 2));
    let later = now + Duration::from_secs(2);
    let admitting = breakers.admitting(&[], later);
    assert!(admitting.avoid().is_empty());
    admitting.booked(Pair { prefill: &a, decode: None }).sent();
    // It is stuck once more while it is tried: that is no other breaker.
    breakers.stuck(&a, later);
    assert_eq!((breakers.open.get(), breakers.openings.get()), (2, 3));
    breakers.admitting(&[], later).booked(Pair { prefill: &b, decode: None }).sent();
    breakers.success(&b, later, later);
    assert_eq!(breakers.open.get(), 1);
}
