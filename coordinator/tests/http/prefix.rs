//! Requests go where their prompts are, by what instances say that they have cached and by what was sent to them.

use baton_coordinator::{CoordinatorConfig, requests::Lookup};
use baton_proto::{BlockHash, Incarnation, InstanceSpec, v1};
use baton_registry::{Store, Txn, keys, records};
use baton_schedule::Scored;
use serde_json::json;
use v1::{FinishReason, attach_response::Frame as Answer};

use crate::scripted::{Cluster, Instance, PATIENCE, cache::chain, prompt_of, served, until};

/// Two that prefill, and one that decodes.
struct Fleet {
    cluster: Cluster,
    prefill: [Instance; 2],
    decode: Instance,
}

impl Fleet {
    /// All caches are read; what is in them is in no prompt.
    async fn start() -> Self {
        // Prompts are short here: every block is told.
        Self::told_of_one_for(0).await
    }

    /// The same, told of one block for so many tokens.
    async fn told_of_one_for(tokens: u32) -> Self {
        let roles = [("p0", v1::Role::Prefill), ("p1", v1::Role::Prefill), ("d", v1::Role::Decode)];
        let patient = move |config: &mut CoordinatorConfig| {
            config.limits.placement_timeout = PATIENCE;
            config.placement.index_every_tokens = tokens;
        };
        let (cluster, [p0, p1, decode]) = Cluster::start(roles, patient).await;
        let fleet = Self { cluster, prefill: [p0, p1], decode };
        for instance in fleet.prefill.iter().chain([&fleet.decode]) {
            instance.cache.opened(1).await;
            instance.cache.snapshot(5, &chain(&[1, 2, 3, 4]));
        }
        fleet.told("snapshot", 3).await;
        fleet
    }

    /// Waits until so many messages of a kind have been taken in.
    async fn told(&self, kind: &'static str, messages: u64) {
        let counted = || self.cluster.service.metrics.cache_events.get_or_create(&label(kind)).get();
        until(&format!("{messages} of kind {kind}"), || counted() >= messages).await;
    }

    fn gaps(&self, reason: &'static str) -> u64 {
        let gaps = &self.cluster.service.metrics.cache_gaps;
        gaps.get_or_create(&baton_coordinator::metrics::reason(reason)).get()
    }

    /// Asks, answers; which of the two prefilled, and the receipt.
    async fn ask(&mut self, question: &str) -> (usize, Vec<Scored>) {
        let messages = json!([{"role": "user", "content": question}]);
        let response = self.cluster.chat(json!({"messages": messages, "max_tokens": 2}));
        let [p0, p1] = &mut self.prefill;
        let (at, p) = tokio::select! {
            dispatch = p0.dispatch() => (0, dispatch),
            dispatch = p1.dispatch() => (1, dispatch),
        };
        assert_eq!(prompt_of(&p), prompt(question));
        let d = self.decode.dispatch().await;
        self.prefill[at].finish(p.leg, 0, "a", FinishReason::HandedOff);
        self.decode.finish(d.leg, 1, "b", FinishReason::Length);
        let response = response.await.expect("ends");
        assert_eq!(response.status(), 200);
        response.bytes().await.expect("is read");
        self.cluster.at_rest().await;
        let Some(Lookup::Ended(card)) = self.cluster.service.roster.find(&p.request_id) else {
            panic!("{} has ended", p.request_id)
        };
        (at, card.placings().0.remove(0).receipt.cheapest)
    }

    async fn each_goes_to(&mut self, question: &str, expected: usize) {
        for _ in 0..3 {
            assert_eq!(self.ask(question).await.0, expected, "{question}");
        }
    }
}

fn label(kind: &'static str) -> baton_coordinator::metrics::KindLabel {
    baton_coordinator::metrics::kind(kind)
}

fn prompt(question: &str) -> Vec<u32> {
    format!("user:{question}\nassistant:").bytes().map(u32::from).collect()
}

fn blocks(question: &str) -> Vec<BlockHash> {
    chain(&prompt(question))
}

fn cached(receipt: &[Scored], instance: &str) -> u32 {
    let of = receipt.iter().find(|scored| scored.instance.as_str() == instance);
    of.unwrap_or_else(|| panic!("{instance} is no candidate")).cached_tokens
}

#[tokio::test]
async fn requests_go_where_instances_say_that_their_prompts_are() {
    let mut fleet = Fleet::start().await;
    let one = blocks("what is it?");
    assert_eq!((prompt("what is it?").len(), one.len()), (27, 6));
    // In two parts; what was known before counts until the second has come.
    fleet.prefill[0].cache.change(6, &one, &[]);
    fleet.prefill[1].cache.part(9, 1, (0, false), &one[..3]);
    fleet.told("change", 1).await;
    fleet.each_goes_to("what is it?", 0).await;
    fleet.prefill[0].cache.change(7, &[], &one);
    fleet.prefill[1].cache.part(9, 1, (1, true), &one[3..]);
    fleet.told("change", 2).await;
    fleet.told("snapshot", 4).await;
    // It begins like the first, which p0 has just computed. Only p1 has the rest.
    let two = blocks("what is it? And that one?");
    assert_eq!((two.len(), &two[..4]), (10, &one[..4]));
    fleet.prefill[1].cache.change(10, &two[4..], &[]);
    fleet.told("change", 3).await;
    let (at, receipt) = fleet.ask("what is it? And that one?").await;
    assert_eq!((at, cached(&receipt, "p1")), (1, 40));
    assert!(cached(&receipt, "p0") <= 16, "{receipt:?}");
    fleet.each_goes_to("what is it? And that one?", 1).await;

    // Of what p0 had only the beginning, as that of every question, is left.
    let three = blocks("another thing altogether");
    fleet.prefill[0].cache.change(8, &three, &[]);
    fleet.prefill[0].cache.change(9, &[], &three[1..]);
    fleet.prefill[1].cache.change(11, &three[..4], &[]);
    fleet.told("change", 6).await;
    let (at, receipt) = fleet.ask("another thing altogether").await;
    assert_eq!((at, cached(&receipt, "p0"), cached(&receipt, "p1")), (1, 4, 16));

    // Decode is told, too, and what it has need not be moved.
    let four = blocks("and a last one");
    fleet.decode.cache.change(6, &four, &[]);
    fleet.told("change", 7).await;
    let (_, receipt) = fleet.ask("and a last one").await;
    assert_eq!(cached(&receipt, "d"), 4 * four.len() as u32);
}

#[tokio::test]
async fn of_long_prompts_one_block_for_some_tokens_is_told_and_enough() {
    let mut fleet = Fleet::told_of_one_for(64).await;
    let question = "a long one ".repeat(70);
    let all = blocks(&question);
    let told = fleet.prefill[1].cache.wanted(&all);
    assert!((4..all.len() / 8).contains(&told.len()), "{} of {}", told.len(), all.len());
    fleet.prefill[1].cache.change(6, &told, &[]);
    fleet.told("change", 1).await;
    let (at, receipt) = fleet.ask(&question).await;
    let last = all.iter().rposition(|hash| Some(hash) == told.last()).expect("one of them");
    assert_eq!((at, cached(&receipt, "p1"), cached(&receipt, "p0")), (1, 4 * (last as u32 + 1), 0));
}

#[tokio::test]
async fn the_same_question_goes_where_it_has_just_been_computed_before_anybody_says_so() {
    let mut fleet = Fleet::start().await;
    let (first, receipt) = fleet.ask("who knows?").await;
    assert_eq!((cached(&receipt, "p0"), cached(&receipt, "p1")), (0, 0));
    for _ in 0..3 {
        let (at, receipt) = fleet.ask("who knows?").await;
        let held = ["p0", "p1"].map(|name| cached(&receipt, name));
        assert_eq!((at, held[first], held[1 - first]), (first, 24, 0));
    }
    // It says in time that it has not kept it.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let (_, receipt) = fleet.ask("who knows?").await;
    assert_eq!((cached(&receipt, "p0"), cached(&receipt, "p1")), (0, 0));
}

#[tokio::test]
async fn what_was_missed_is_asked_for_again_and_counts_meanwhile() {
    let mut fleet = Fleet::start().await;
    fleet.prefill[1].cache.change(6, &blocks("a question"), &[]);
    fleet.told("change", 1).await;
    fleet.prefill[1].cache.change(8, &blocks("lost"), &[]);
    until("the gap is seen", || fleet.gaps("gap") == 1).await;
    fleet.each_goes_to("a question", 1).await;
    fleet.prefill[1].cache.opened(2).await;
    fleet.prefill[1].cache.snapshot(8, &blocks("not lost"));
    fleet.told("snapshot", 4).await;
    fleet.each_goes_to("not lost", 1).await;
    // Too slow a reader gets a snapshot in place of what it missed.
    fleet.prefill[1].cache.snapshot(20, &blocks("of late"));
    fleet.told("snapshot", 5).await;
    assert_eq!(fleet.gaps("lagged"), 1);
    fleet.each_goes_to("of late", 1).await;
    // Another process than the one that the stream of requests is to.
    fleet.prefill[1].cache.part(1, 2, (0, true), &[]);
    fleet.prefill[1].cache.opened(3).await;
    assert_eq!(fleet.gaps("restart"), 1);
}

#[tokio::test]
async fn whoever_comes_back_says_what_it_has_and_is_told_the_rest() {
    let mut fleet = Fleet::start().await;
    let cache = fleet.prefill[1].cache.clone();
    assert_eq!(cache.known(), (1, 0));
    cache.change(6, &blocks("a question"), &[]);
    fleet.told("change", 1).await;
    // A change is lost.
    cache.change(8, &blocks("not lost"), &[]);
    cache.opened(2).await;
    assert_eq!(cache.known(), (1, 6));
    cache.goes_on(6);
    cache.change(7, &blocks("evicted"), &[]);
    cache.change(8, &blocks("not lost"), &[]);
    fleet.told("change", 3).await;
    fleet.each_goes_to("a question", 1).await;
    fleet.each_goes_to("not lost", 1).await;
    // The connection breaks, and the process lives.
    fleet.prefill[1].cut();
    cache.opened(3).await;
    assert_eq!(cache.known(), (1, 8));
    cache.goes_on(8);
    cache.change(9, &blocks("new"), &blocks("evicted")[1..]);
    fleet.told("change", 4).await;
    fleet.told("resumed", 2).await;
    fleet.each_goes_to("not lost", 1).await;
    fleet.each_goes_to("new", 1).await;
    let (_, receipt) = fleet.ask("evicted").await;
    assert_eq!(cached(&receipt, "p1"), 4, "but for the beginning of every question");
    let snapshots = fleet.cluster.service.metrics.cache_events.get_or_create(&label("snapshot")).get();
    assert_eq!((snapshots, fleet.gaps("gap")), (3, 1), "one of each instance at the beginning");
    // It goes on from where nobody is.
    fleet.prefill[1].cut();
    cache.opened(4).await;
    cache.goes_on(3);
    until("it is not believed", || fleet.gaps("nonsense") == 1).await;
    let (_, receipt) = fleet.ask("new").await;
    assert!(cached(&receipt, "p1") <= 12, "only what is expected of what it was sent");
}

#[tokio::test]
async fn a_process_that_is_gone_has_nothing() {
    let mut fleet = Fleet::start().await;
    fleet.prefill[1].cache.change(6, &blocks("a question"), &[]);
    fleet.told("change", 1).await;
    fleet.each_goes_to("a question", 1).await;
    fleet.prefill[1].kill().await;
    fleet.prefill[1].restart().await;
    fleet.prefill[1].cache.opened(1).await;
    fleet.prefill[1].cache.snapshot(0, &[]);
    fleet.told("snapshot", 4).await;
    // It is of the same incarnation here: what was sent to it is expected of it for a while.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let (_, receipt) = fleet.ask("a question").await;
    assert_eq!(cached(&receipt, "p1"), 0);
}

#[tokio::test]
async fn another_process_of_an_instance_has_nothing_from_the_first() {
    let mut fleet = Fleet::start().await;
    fleet.prefill[1].cache.change(6, &blocks("a question"), &[]);
    fleet.told("change", 1).await;
    fleet.each_goes_to("a question", 1).await;
    let p1 = &mut fleet.prefill[1];
    p1.kill().await;
    p1.restart_as(2).await;
    let spec = InstanceSpec { incarnation: Incarnation(2), ..p1.spec(&served()) };
    let put = Txn::new().put(keys::instance(&p1.id), records::encode_spec(&spec), None);
    fleet.cluster.store.txn(put).await.expect("puts");
    fleet.prefill[1].cache.opened(1).await;
    assert_eq!(fleet.prefill[1].cache.known(), (2, 0));
    // It has said nothing yet.
    let (_, receipt) = fleet.ask("a question").await;
    assert_eq!(cached(&receipt, "p1"), 0);
}

#[tokio::test]
async fn who_says_what_cannot_be_is_not_believed_and_serves_all_the_same() {
    let mut fleet = Fleet::start().await;
    fleet.prefill[1].cache.change(6, &blocks("a question"), &[]);
    fleet.told("change", 1).await;
    fleet.each_goes_to("a question", 1).await;
    fleet.prefill[1].cache.nonsense(7);
    until("it is not believed", || fleet.gaps("nonsense") == 1).await;
    // The other is busy: the next go to this one.
    let busy = v1::InstanceLoad { queued_prefill_tokens: 1 << 20, ..Default::default() };
    fleet.prefill[0].say(Answer::Load(busy));
    let mut asked = 0;
    loop {
        let (at, receipt) = fleet.ask("a question").await;
        assert_eq!(cached(&receipt, "p1"), 0);
        asked += 1;
        if at == 1 {
            break;
        }
        assert!(asked < 1000, "it is asked nothing any more");
    }
}

#[tokio::test]
async fn an_answer_whose_decode_dies_goes_on_from_the_prefill_that_has_its_prompt() {
    let question = "what is it that was asked before?";
    for has in [0, 1] {
        let mut fleet = Fleet::start().await;
        fleet.prefill[has].cache.change(6, &blocks(question), &[]);
        fleet.told("change", 1).await;
        let messages = json!([{"role": "user", "content": question}]);
        let response = fleet.cluster.chat(json!({"messages": messages, "max_tokens": 4}));
        let prefill = &mut fleet.prefill[has];
        let first = prefill.dispatch().await;
        let taken = fleet.decode.dispatch().await;
        prefill.finish(first.leg, 0, "a", FinishReason::HandedOff);
        fleet.decode.tokens(taken.leg, 1, "b");
        let two = || fleet.cluster.service.roster.list().iter().any(|card| card.completion_tokens() == 2);
        until("two tokens are there", two).await;
        fleet.decode.cut();
        let (again, resumed) = (prefill.dispatch().await, fleet.decode.dispatch().await);
        assert_eq!(again.generated_tokens, b"ab".map(u32::from));
        prefill.finish(again.leg, 2, "c", FinishReason::HandedOff);
        fleet.decode.finish(resumed.leg, 3, "d", FinishReason::Length);
        assert_eq!(response.await.expect("ends").status(), 200);
        let placings = fleet.cluster.service.roster.find(&first.request_id);
        let Some(Lookup::Ended(card) | Lookup::Running(card)) = placings else { panic!("it was there") };
        let receipt = &card.placings().0[1].receipt.cheapest;
        // All full blocks of its prompt, and of nothing else.
        assert_eq!(cached(receipt, &format!("p{has}")), blocks(question).len() as u32 * 4);
        fleet.cluster.at_rest().await;
    }
}
