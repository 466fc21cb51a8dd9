//! Requests that look for a place, over a board and links that the tests set up.

use baton_schedule::fleet::{
    Role, Spec,
    testing::{ready, spec},
};

use super::*;
use crate::prepare::{
    Endpoint, parse, prepare,
    tests::{LIMITS, served},
};

/// How long anybody waits.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn placer(board: Arc<Board>, links: Links) -> Placer {
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    Placer {
        board,
        links: Arc::new(links),
        handoffs: Arc::default(),
        breakers: Arc::new(Breakers::new(&metrics)),
        metrics,
        placement_timeout: PATIENCE,
        carry_patience: PATIENCE,
        move_after: PATIENCE,
    }
}

#[tokio::test(start_paused = true)]
async fn all_prompts_together_wait_no_longer_than_one() {
    let board = Board::new(Duration::from_secs(60));
    let (small, large) = (Spec { context_tokens: 8, ..spec("a") }, spec("b"));
    board.list(&[small.clone(), large.clone()], Instant::now());
    let (served, placer) = (served(), placer(board.clone(), Links::default()));
    let body = r#"{"model": "tiny", "prompt": ["short", "one that only the large one holds"]}"#;
    let request = parse(body.as_bytes()).expect("is JSON");
    let prepared = prepare(&served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
    // The first prompt waits for most of the time, the second for what is left.
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        board.up(&small.id, small.incarnation, ready(Role::Mixed));
    });
    let began = Instant::now();
    let hour = began + Duration::from_secs(3600);
    assert!(matches!(placer.book_all_by(hour, &served, &prepared.prompts).await, Err(NoPlace::NoInstance)));
    assert_eq!(began.elapsed(), PATIENCE);
    let soon = Instant::now() + Duration::from_secs(1);
    assert!(placer.book_all_by(soon, &served, &prepared.prompts).await.is_err());
    assert_eq!(began.elapsed(), PATIENCE + Duration::from_secs(1), "nor past the request's own deadline");
}
