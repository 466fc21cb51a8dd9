//! Which controller is called next, and when to pause. Pure.
//!
//! All controllers are asked in a round, one straight after the other, then there is a pause that grows with the
//! rounds. The leader that a standby names is asked next, listed or not. Each is asked once a round: a leader that is
//! gone is named until its successor is found.

/// See the module.
#[derive(Debug)]
pub(super) struct Rounds {
    /// At least one.
    controllers: Vec<String>,
    /// Of the list: who is asked next, and how many are left in this round.
    next: usize,
    left: usize,
    /// In this round.
    asked: Vec<String>,
    named: Option<String>,
    /// Whose session has just broken: asked in its turn, whoever names it.
    broken: Option<String>,
    /// Rounds without a welcome.
    fruitless: u32,
}

impl Rounds {
    pub(super) fn new(controllers: Vec<String>) -> Self {
        let left = controllers.len();
        Self { controllers, next: 0, left, asked: Vec::new(), named: None, broken: None, fruitless: 0 }
    }

    /// Whom to call now.
    pub(super) fn call(&mut self) -> String {
        let controller = self.named.take().unwrap_or_else(|| self.take_next());
        self.asked.push(controller.clone());
        controller
    }

    /// The call had no success; perhaps somebody else was named. Says how many rounds had been fruitless before, if
    /// this one is over: time for a pause. Otherwise the next call is due at once.
    pub(super) fn failed(&mut self, named: Option<String>) -> Option<u32> {
        self.named =
            named.filter(|leader| !self.asked.contains(leader) && self.broken.as_ref() != Some(leader));
        while self.left > 0 && self.asked.contains(&self.controllers[self.next]) {
            self.take_next();
        }
        if self.named.is_some() || self.left > 0 {
            return None;
        }
        let before = self.fruitless;
        self.fruitless = before.saturating_add(1);
        self.begin();
        Some(before)
    }

    /// A session that was welcomed has broken: the next round begins after its controller, and with a short pause.
    pub(super) fn broke(&mut self) {
        let broken = self.asked.pop();
        if let Some(at) = self.controllers.iter().position(|listed| Some(listed) == broken.as_ref()) {
            self.next = (at + 1) % self.controllers.len();
        }
        self.begin();
        self.broken = broken;
        self.fruitless = 0;
    }

    fn begin(&mut self) {
        self.left = self.controllers.len();
        self.asked.clear();
        (self.named, self.broken) = (None, None);
    }

    fn take_next(&mut self) -> String {
        let controller = self.controllers[self.next].clone();
        self.next = (self.next + 1) % self.controllers.len();
        self.left = self.left.saturating_sub(1);
        controller
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds() -> Rounds {
        Rounds::new(["a", "b", "c"].map(str::to_owned).into())
    }

    #[test]
    fn all_are_asked_in_a_round() {
        let mut rounds = rounds();
        for round in 0..3 {
            for (controller, end) in [("a", None), ("b", None), ("c", Some(round))] {
                assert_eq!(rounds.call(), controller);
                assert_eq!(rounds.failed(None), end);
            }
        }
    }

    #[test]
    fn who_is_named_is_asked_next_and_once() {
        let mut rounds = rounds();
        assert_eq!(rounds.call(), "a");
        assert_eq!(rounds.failed(Some("c".into())), None);
        assert_eq!(rounds.call(), "c");
        assert_eq!(rounds.failed(Some("unlisted".into())), None);
        assert_eq!(rounds.call(), "unlisted");
        assert_eq!(rounds.failed(Some("a".into())), None);
        assert_eq!(rounds.call(), "b");
        assert_eq!(rounds.failed(Some("c".into())), Some(0), "c was asked as the leader");
        assert_eq!(rounds.call(), "a");
    }

    #[test]
    fn after_a_break_the_others_come_first_even_if_they_name_it() {
        let mut rounds = rounds();
        assert_eq!(rounds.call(), "a");
        assert_eq!(rounds.failed(Some("b".into())), None);
        assert_eq!(rounds.call(), "b");
        rounds.broke();
        for (controller, end) in [("c", None), ("a", None), ("b", Some(0))] {
            assert_eq!(rounds.call(), controller);
            assert_eq!(rounds.failed(Some("b".into())), end);
        }
        assert_eq!(rounds.call(), "c");
        assert_eq!(rounds.failed(Some("b".into())), None);
        assert_eq!(rounds.call(), "b", "from the second round on it may be back");
    }
}
