//! Offers that come early, or from peers that name what is not theirs, or are more than there is room for: the rightful
//! sender's transfer is neither hindered nor forgotten. And one that never comes.

use std::time::{Duration, Instant};

use crate::support::{scripted::*, *};
use baton_kvtransfer::{ExpectSpec, Limits, TransferError};
use baton_proto::{ApiError, ErrorCode, TransferId, v1};
use v1::{receiver_message::Body as Told, sender_message::Body};

/// A receiver that holds and remembers little.
fn small() -> Peer {
    let limits = Limits { held_offers: 2, remembered_transfers: 4, ..limits() };
    Peer::start_with("decode-0", Setup { limits, ..Setup::default() })
}

/// Has a transfer of one block come whole; what its sender sealed.
async fn whole(decode: &Peer, sender: &mut ScriptedSender, id: TransferId, block: u32) -> v1::Seal {
    let mut incoming = decode.node.expect(expect_spec(id, &instance("prefill-0"), &[block])).expect("room");
    sender.offer(id, 1, 1).await;
    let key = sender.accepted().await;
    let mut data = sender.connect_data().await;
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        write(&mut data, &RawFrame::new(id, &key, layer, 0, slices(1, layer, 0..1)).bytes()).await;
        all.push((layer, 0, pattern(1, layer, 0, SLICE)));
    }
    let seal = seal(7, &all);
    sender.say(id, Body::Seal(seal.clone())).await;
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    assert!(matches!(sender.hear().await.1, Told::Released(_)));
    seal
}

#[tokio::test]
async fn whoever_offers_first_does_not_shut_out_the_sender_that_is_expected() {
    // What the wrong one does before the transfer is expected: nothing more, give it up, go away.
    for what in ["waits", "gives it up", "goes away"] {
        let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
        let wrong = ScriptedSender::open(&decode, "meddler", 1).await.expect("welcome");
        let id = TransferId::generate();
        wrong.offer(id, 1, 1).await;
        until("the wrong offer is held", || decode.node.stats().held_offers == 1).await;
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[3])).expect("room");
        prefill.fill(6, &[3]);
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        until("both are held", || decode.node.stats().held_offers == 2).await;
        let mut wrong = (what != "goes away").then_some(wrong);
        if what == "gives it up" {
            let wrong = wrong.as_ref().expect("still there");
            wrong.say(id, Body::Abort(v1::Abort { reason: None })).await;
        }
        let left = if what == "waits" { 2 } else { 1 };
        until("the wrong one is done", || decode.node.stats().held_offers == left).await;
        let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[9])).expect("its sender's");
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        assert!(decode.holds(6, &[9]));
        if let ("waits", Some(wrong)) = (what, &mut wrong) {
            let refusal = wrong.aborted().await;
            assert_eq!(refusal.code(), v1::ErrorCode::HandoffFailed, "{refusal:?}");
        }
        decode.idle().await;
    }
}

#[tokio::test]
async fn an_offer_that_was_refused_for_want_of_room_speaks_for_its_sender_alone() {
    let decode = small();
    let mut loud = ScriptedSender::open(&decode, "loud", 1).await.expect("welcome");
    let mut sender = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    for one in [&loud, &sender] {
        one.offer(TransferId::generate(), 1, 1).await;
    }
    until("both are held", || decode.node.stats().held_offers == 2).await;
    let (theirs, own) = (TransferId::generate(), TransferId::generate());
    loud.offer(theirs, 1, 1).await;
    assert_eq!(loud.aborted().await.code(), v1::ErrorCode::QueueFull);
    sender.offer(own, 1, 1).await;
    assert_eq!(sender.aborted().await.code(), v1::ErrorCode::QueueFull);
    // Whoever expects what was refused learns it at once, and another's refusal is nothing to it.
    let error = decode.node.expect(expect_spec(own, &instance("prefill-0"), &[1])).expect_err("refused");
    assert!(matches!(error, TransferError::Limit { limit: 2, .. }), "{error}");
    whole(&decode, &mut sender, theirs, 1).await;
}

#[tokio::test]
async fn whoever_fills_the_room_for_early_offers_makes_room_for_the_others() {
    let decode = small();
    let mut loud = ScriptedSender::open(&decode, "loud", 1).await.expect("welcome");
    let mut sender = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    let theirs = [TransferId::generate(), TransferId::generate()];
    for id in theirs {
        loud.offer(id, 1, 1).await;
    }
    until("it is full", || decode.node.stats().held_offers == 2).await;
    let own = TransferId::generate();
    sender.offer(own, 1, 1).await;
    let (displaced, Told::Abort(abort)) = loud.hear().await else { panic!("not an abort") };
    assert_eq!(displaced, theirs[0], "the oldest");
    assert_eq!(abort.reason.expect("a reason").code(), v1::ErrorCode::QueueFull);
    until("no more than there is room for", || decode.node.stats().held_offers == 2).await;
    let late = decode.node.expect(expect_spec(displaced, &instance("loud"), &[1])).expect_err("displaced");
    assert!(matches!(late, TransferError::Limit { limit: 2, .. }), "{late}");
    // Nor does it speak for whoever is expected to send it.
    let mut incoming = decode.node.expect(expect_spec(displaced, &instance("prefill-0"), &[1])).expect("its");
    sender.offer(displaced, 1, 1).await;
    sender.accepted().await;
    incoming.cancel("enough");
    assert_eq!(
        within("its end", 10, incoming.sealed()).await.expect_err("cancelled").code(),
        ErrorCode::Cancelled
    );
    sender.aborted().await;
    // Those that were held are as good as ever.
    for (id, sender, from) in [(theirs[1], &mut loud, "loud"), (own, &mut sender, "prefill-0")] {
        let _incoming = decode.node.expect(expect_spec(id, &instance(from), &[2])).expect("held");
        sender.accepted().await;
    }
}

#[tokio::test]
async fn offers_that_nobody_expects_are_bounded_in_number_and_time() {
    let limits = Limits { held_offers: 2, held_offer: Duration::from_millis(300), ..limits() };
    let decode = Peer::start_with("decode-0", Setup { limits, ..Setup::default() });
    let prefill = Peer::start("prefill-0");
    let offer = || prefill.node.offer(offer_spec(TransferId::generate(), &decode, &[5, 6, 9])).expect("room");
    let mut held = [offer(), offer()];
    until("two are held", || decode.node.stats().held_offers == 2).await;
    let mut refused = offer();
    let waits_for_it = tokio::spawn(decode.node.offered(refused.id()));
    let error = within("the refusal", 10, refused.finished()).await.expect_err("too many");
    assert_eq!(error.code(), ErrorCode::QueueFull);
    // Whoever waits for the offer learns that it was made and will not come again.
    within("the same on this side", 10, waits_for_it).await.expect("no panic");
    let spec = expect_spec(refused.id(), &prefill.name, &[60, 2, 31]);
    assert_eq!(decode.node.expect(spec).expect_err("refused").code(), ErrorCode::QueueFull);
    for outgoing in &mut held {
        let error = within("its deadline", 10, outgoing.finished()).await.expect_err("never expected");
        assert_eq!(error.code(), ErrorCode::DeadlineExceeded);
    }
    until("room for offers again", || decode.node.stats().held_offers == 0).await;
    within("an offer that is over", 10, decode.node.offered(held[0].id())).await;
    let late = decode.node.expect(expect_spec(held[0].id(), &prefill.name, &[60, 2, 31])).expect_err("over");
    assert_eq!(late.code(), ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn no_number_of_offers_makes_a_node_forget_what_it_has_released() {
    let decode = small();
    let mut sender = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    let id = TransferId::generate();
    let sealed = whole(&decode, &mut sender, id, 1).await;
    let mut loud = ScriptedSender::open(&decode, "loud", 1).await.expect("welcome");
    let held = [TransferId::generate(), TransferId::generate()];
    for id in held {
        loud.offer(id, 1, 1).await;
    }
    for _ in 0..20 {
        loud.offer(TransferId::generate(), 1, 1).await;
        assert_eq!(loud.aborted().await.code(), v1::ErrorCode::QueueFull);
    }
    // Those that are withdrawn take as little.
    for id in held {
        loud.say(id, Body::Abort(v1::Abort { reason: None })).await;
    }
    for _ in 0..10 {
        until("there is room", || decode.node.stats().held_offers == 0).await;
        let id = TransferId::generate();
        loud.offer(id, 1, 1).await;
        loud.say(id, Body::Abort(v1::Abort { reason: None })).await;
    }
    // The sender has not heard of its release, and asks over a new stream.
    let mut again = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    again.say(id, Body::Seal(sealed)).await;
    assert!(matches!(again.hear().await, (told, Told::Released(_)) if told == id));
    let error =
        decode.node.expect(expect_spec(id, &instance("prefill-0"), &[2])).expect_err("an id is used once");
    assert_eq!(error.code(), ErrorCode::AlreadyExists);
    // The owner's own refusals are remembered as ever.
    let refused = TransferId::generate();
    decode.node.refuse(refused, ApiError::new(ErrorCode::Unavailable, "no"));
    sender.to_peer.closed().await;
    again.offer(refused, 1, 1).await;
    assert_eq!(again.aborted().await.code(), v1::ErrorCode::Unavailable);
}

#[tokio::test]
async fn an_offer_that_does_not_name_its_prompt_is_refused() {
    let decode = Peer::start("decode-0");
    let mut sender = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    for prompt_digest in [vec![], vec![1; 16]] {
        let prompt_digest = prompt_digest.into();
        let offer =
            v1::Offer { prompt_tokens: 16, blocks: 1, layers: LAYERS, sender_epoch: 1, prompt_digest };
        sender.say(TransferId::generate(), Body::Offer(offer)).await;
        let refusal = sender.aborted().await;
        assert!(refusal.message.contains("does not say of which prompt"), "{refusal:?}");
        assert_eq!(decode.node.stats().held_offers, 0);
    }
}

#[tokio::test]
async fn an_offer_from_the_wrong_peer_is_refused_and_the_right_one_still_welcome() {
    let decode = Peer::start("decode-0");
    let id = TransferId::generate();
    let mut wrong = ScriptedSender::open(&decode, "meddler", 1).await.expect("welcome");
    // Once before and once after it is expected.
    for early in [true, false] {
        let id = if early { id } else { TransferId::generate() };
        if early {
            wrong.offer(id, 1, 1).await;
            until("the offer is held", || decode.node.stats().held_offers == 1).await;
        }
        let mut incoming = decode.node.expect(expect_spec(id, &instance("prefill-0"), &[3])).expect("room");
        if !early {
            wrong.offer(id, 1, 1).await;
        }
        assert_eq!(wrong.aborted().await.code(), v1::ErrorCode::HandoffFailed);
        let prefill = Peer::start("prefill-0");
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[3])).expect("room");
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        incoming.close().await;
        prefill.stop.cancel();
        prefill.node.stopped().await;
    }
}

#[tokio::test]
async fn how_a_transfer_ended_is_told_to_its_sender_and_not_to_who_offered_it_first() {
    let decode = Peer::start("decode-0");
    let id = TransferId::generate();
    let mut wrong = ScriptedSender::open(&decode, "meddler", 1).await.expect("welcome");
    wrong.offer(id, 1, 1).await;
    until("the offer is held", || decode.node.stats().held_offers == 1).await;
    let mut incoming = decode.node.expect(expect_spec(id, &instance("prefill-0"), &[3])).expect("room");
    wrong.aborted().await;
    let mut right = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    right.offer(id, 1, 1).await;
    let (key, mut data) = (right.accepted().await, right.connect_data().await);
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        let slices = slices(1, layer, 0..1);
        write(&mut data, &RawFrame::new(id, &key, layer, 0, slices.clone()).bytes()).await;
        all.extend(slices.into_iter().map(|slice| (layer, 0, slice)));
    }
    let seal = Body::Seal(seal(1, &all));
    right.say(id, seal.clone()).await;
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    incoming.close().await;
    drop(right);
    wrong.say(id, seal.clone()).await;
    assert_eq!(wrong.aborted().await.code(), v1::ErrorCode::HandoffFailed);
    let mut right = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    right.say(id, seal).await;
    assert!(matches!(right.hear().await.1, Told::Released(_)));
}

#[tokio::test]
async fn an_expectation_that_is_never_offered_ends_at_its_deadline_and_gives_its_blocks_back() {
    let decode = Peer::start("decode-0");
    // Its sender is there, and goes: that is no end of what it has not offered, as it may come again.
    let sender = ScriptedSender::open(&decode, "prefill-0", 1).await.expect("welcome");
    let deadline = Instant::now() + Duration::from_millis(300);
    let id = TransferId::generate();
    let spec = ExpectSpec { deadline, ..expect_spec(id, &instance("prefill-0"), &[4, 5]) };
    let mut incoming = decode.node.expect(spec).expect("room");
    drop(sender);
    let error = within("the deadline", 10, incoming.sealed()).await.expect_err("never offered");
    assert!(Instant::now() >= deadline);
    assert_eq!(error, TransferError::DeadlineExceeded { waiting_for: "waiting for the offer" });
    assert_eq!(within("the blocks", 10, incoming.close()).await, [4, 5]);
    decode.idle().await;
    // One that comes after all is refused with the reason.
    let mut late = ScriptedSender::open(&decode, "prefill-0", 2).await.expect("welcome");
    late.offer(id, 2, 2).await;
    assert_eq!(late.aborted().await.code(), v1::ErrorCode::DeadlineExceeded);
}
