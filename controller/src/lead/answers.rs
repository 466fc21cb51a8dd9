//! Changes by operators on their way into the store. Each is answered, and entered in the journal, once it is there.
//!
//! A change is there when a write that was looked up after it was made has succeeded: one that was under way already
//! carries what was wanted before. Where the store takes nothing, the operator is told so after a while; the change stands
//! and is stored once that can be.

use std::time::Duration;

use baton_proto::{ApiError, ErrorCode};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    desk::Plans,
    journal::News,
    reconcile::{Record, Write},
};

/// Changes that wait to be stored.
const MOST: usize = 256;
/// How long an operator waits for the store.
const PATIENCE: Duration = Duration::from_secs(5);

/// The way back to an operator.
pub(super) type Answer = oneshot::Sender<Result<Plans, ApiError>>;

struct Waiting {
    record: Record,
    news: News,
    /// None once the operator was told that it takes longer.
    answer: Option<(Plans, Answer)>,
    since: Instant,
    /// A write that carries it is under way.
    under_way: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Answers {
    waiting: Vec<Waiting>,
}

impl Answers {
    /// Why no more changes are taken at the moment.
    pub(super) fn refuse(&self) -> Result<(), ApiError> {
        if self.waiting.len() < MOST {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::QueueFull, format!("{MOST} changes wait for the state store already")))
    }

    pub(super) fn wait(&mut self, record: Record, news: News, plans: Plans, answer: Answer, now: Instant) {
        let answer = Some((plans, answer));
        self.waiting.push(Waiting { record, news, answer, since: now, under_way: false });
    }

    /// These were looked up and are under way.
    pub(super) fn sent(&mut self, writes: &[Write]) {
        for waiting in &mut self.waiting {
            waiting.under_way |= writes.iter().any(|write| write.record == waiting.record);
        }
    }

    /// These were not written, and will be looked up again.
    pub(super) fn given_back(&mut self, writes: &[Write]) {
        for waiting in &mut self.waiting {
            waiting.under_way &= writes.iter().all(|write| write.record != waiting.record);
        }
    }

    /// The record is in the store as it was sent. What that makes news.
    pub(super) fn stored(&mut self, record: &Record) -> Vec<News> {
        let stored = |waiting: &mut Waiting| waiting.under_way && waiting.record == *record;
        let mut news = Vec::new();
        for waiting in self.waiting.extract_if(.., stored) {
            if let Some((plans, answer)) = waiting.answer {
                // Whoever asked may have gone.
                answer.send(Ok(plans)).ok();
            }
            news.push(waiting.news);
        }
        news
    }

    /// The store will not have the record. It stands in memory and is tried again now and then.
    pub(super) fn refused(&mut self, record: &Record, reason: &str) {
        let message = format!("the state store refuses this change: {reason}");
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.record == *record) {
            waiting.under_way = false;
            waiting.tell(&message);
        }
    }

    /// Tells those who have waited long what the store last said.
    pub(super) fn give_up(&mut self, now: Instant, last_error: Option<&str>) {
        let why = last_error.unwrap_or("it does not answer");
        let message = format!("the state store takes no changes ({why}); this one is made once it does");
        for waiting in self.waiting.iter_mut().filter(|it| now.duration_since(it.since) >= PATIENCE) {
            waiting.tell(&message);
        }
    }

    /// When somebody will have waited long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let waits = self.waiting.iter().filter(|waiting| waiting.answer.is_some());
        waits.map(|waiting| waiting.since + PATIENCE).min()
    }
}

impl Waiting {
    fn tell(&mut self, message: &str) {
        if let Some((_, answer)) = self.answer.take() {
            answer.send(Err(ApiError::new(ErrorCode::Unavailable, message))).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::InstanceId;

    use super::*;
    use crate::journal::NewsKind;

    fn record() -> Record {
        Record::Intent(InstanceId::new("a").expect("a good id"))
    }

    fn write() -> Write {
        Write { record: record(), value: None, epoch: None }
    }

    fn wait(answers: &mut Answers, kind: NewsKind) -> oneshot::Receiver<Result<Plans, ApiError>> {
        let (answer, answered) = oneshot::channel();
        let news = News { kind, group: None, instance: None, message: String::new(), actor: None };
        let plans = Plans { plans: Vec::new() };
        answers.wait(record(), news, plans, answer, Instant::now());
        answered
    }

    #[test]
    fn a_write_that_was_under_way_answers_no_later_change() {
        let mut answers = Answers::default();
        let mut first = wait(&mut answers, NewsKind::Cordoned);
        answers.sent(&[write()]);
        let mut second = wait(&mut answers, NewsKind::Uncordoned);
        let kinds = |news: Vec<News>| news.into_iter().map(|news| news.kind).collect::<Vec<_>>();
        assert_eq!(kinds(answers.stored(&record())), [NewsKind::Cordoned]);
        assert!(first.try_recv().expect("answered").is_ok() && second.try_recv().is_err());
        // The one that carries it fails first.
        answers.sent(&[write()]);
        answers.given_back(&[write()]);
        assert_eq!(kinds(answers.stored(&record())), []);
        answers.sent(&[write()]);
        assert_eq!(kinds(answers.stored(&record())), [NewsKind::Uncordoned]);
        assert!(second.try_recv().expect("answered").is_ok());
    }

    #[test]
    fn who_waits_long_is_told_why_and_the_change_is_news_all_the_same() {
        let mut answers = Answers::default();
        let mut answered = wait(&mut answers, NewsKind::Pinned);
        let due = answers.next_deadline().expect("somebody waits");
        answers.give_up(due - Duration::from_millis(1), None);
        assert!(answered.try_recv().is_err());
        answers.give_up(due, Some("no space"));
        let told = answered.try_recv().expect("answered").expect_err("not stored");
        assert!(told.message.contains("takes no changes (no space)"), "{told}");
        assert_eq!(answers.next_deadline(), None);
        answers.sent(&[write()]);
        assert_eq!(answers.stored(&record()).len(), 1);
    }
}
