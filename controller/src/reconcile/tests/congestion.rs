//! Groups whose prompts wait: told once when it begins and once when it ends, with numbers.

use super::*;

/// Lets the pair beat for so long, with so many prompt tokens queued at the one that prefills.
fn queued(world: &mut World, (a, b): (SessionId, SessionId), tokens: u64, seconds: u64) -> Vec<News> {
    let mut news = Vec::new();
    for _ in 0..seconds {
        let (prefill, decode) = (world.last_assigned(a), world.last_assigned(b));
        let mut prefills = beat(Phase::Ready, prefill.role, prefill.epoch.0);
        (prefills.load.queued_prefill_tokens, prefills.load.prefill_tokens_per_second) = (tokens, 1000);
        // They get on with it.
        let progress = world.mind.members()[&id("a")].beat.load.progress + 1;
        prefills.load.progress = progress;
        world.beat(a, prefills);
        let mut decodes = beat(Phase::Ready, decode.role, decode.epoch.0);
        // What waits there waits for its cache.
        (decodes.load.queued_prefill_tokens, decodes.load.progress) = (1_000_000, progress);
        world.beat(b, decodes);
        world.now += secs(1);
        world.settle();
        news.append(&mut world.mind.take_news());
    }
    news.retain(|news| matches!(news.kind, NewsKind::CongestionRaised | NewsKind::CongestionCleared));
    news
}

#[test]
fn a_group_is_congested_while_prompts_wait_beyond_its_target() {
    let (mut world, a, b) = World::pair();
    assert_eq!(queued(&mut world, (a, b), 900, 60), []);
    let raised = queued(&mut world, (a, b), 4200, 60);
    let [News { kind: NewsKind::CongestionRaised, group: Some(group), message, .. }] = &raised[..] else {
        panic!("{raised:?}")
    };
    assert_eq!(group, &GroupName::default());
    let queue = "a wait of 4.2 s: 4200 tokens queued at 1 instances that compute 1000 tokens/s";
    assert_eq!(message, &format!("{queue}; above 1.0 s for 10 s"));
    let queues: Vec<_> = world.mind.queues().map(|(_, queue)| queue).collect();
    assert_eq!(queues, [Queue { wait: Duration::from_millis(4200), congested: true }]);
    assert_eq!(queued(&mut world, (a, b), 700, 60), [], "it is better, and not good");
    let cleared = queued(&mut world, (a, b), 100, 60);
    assert!(
        matches!(&cleared[..], [News { kind: NewsKind::CongestionCleared, message, .. }] if message.contains("below 0.5 s")),
        "{cleared:?}"
    );
}

#[test]
fn a_bound_of_its_own_takes_the_place_of_the_target() {
    let (mut world, a, b) = World::pair();
    let congestion = CongestionConfig { wait: secs(5), ..CongestionConfig::default() };
    world.mind = world.mind.clone().with_congestion(congestion);
    assert_eq!(queued(&mut world, (a, b), 4200, 60), []);
    assert_eq!(queued(&mut world, (a, b), 5200, 60).len(), 1);
}

#[test]
fn it_ends_with_those_whose_prompts_waited() {
    let (mut world, a, b) = World::pair();
    assert_eq!(queued(&mut world, (a, b), 4200, 60).len(), 1);
    assert!(world.mind.plans(world.now)[0].congested);
    // The one that prefills is started anew: it has measured nothing yet, and nothing waits there.
    world.event(Event::Closed { session: a });
    let a = world.hello("a", 2, silent());
    world.pass(secs(1), &[a, b]);
    world.obey(a);
    world.pass(secs(1), &[a, b]);
    assert!(!world.mind.plans(world.now)[0].congested, "nobody can say that anything waits");
    world.pass(secs(20), &[a, b]);
    let cleared = world.mind.take_news();
    assert!(cleared.iter().any(|news| news.kind == NewsKind::CongestionCleared), "{cleared:?}");
}
