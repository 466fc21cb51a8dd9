//! How much of everything a node takes, and how long it waits.

use std::time::Duration;

use crate::{
    TransferError,
    transport::{Terms, Waits},
};

/// Bounds of everything that could grow. What is over a bound is refused with an error that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Transfers being received at a time, expected ones included.
    pub incoming_transfers: usize,
    /// Transfers being sent at a time, waiting ones included.
    pub outgoing_transfers: usize,
    /// Offers held that nobody has expected yet. Over it, one of a peer that has fewer takes the place of the oldest of the
    /// peer that has the most; more are refused.
    pub held_offers: usize,
    /// How long such an offer is held.
    pub held_offer: Duration,
    /// Ended transfers remembered, so that their late messages are told from unknown ones and their ids not reused; and,
    /// apart from them, as many offers that were refused or withdrawn before anybody expected them.
    pub remembered_transfers: usize,
    /// Peers with a control stream, each way. Over it one that has no transfers gives way.
    pub peers: usize,
    /// Control streams to this node whose peer has not proven yet that it belongs to the fleet. Over it the oldest of them
    /// is cut for a new one, and comes again if its peer means it. Each may take `handshake` for its hello and for its
    /// proof. As many as there are peers, which may all come at once when this node has restarted.
    pub unproven_streams: usize,
    /// Payload bytes of one frame; at least one slice travels in a frame, however large.
    pub frame_bytes: usize,
    /// Bytes that may wait in one TCP data connection for the peer's acknowledgement; as the kernel is asked, which keeps
    /// to `net.core.wmem_max`. `None` = 512 KiB to a peer of the same host, which is the fastest there; elsewhere what the
    /// kernel finds to be right for the connection as it goes, up to the last of `net.ipv4.tcp_wmem`. A fixed number turns
    /// that off: it must then be the network's bandwidth times its round trip, divided by the connections.
    pub send_buffer: Option<usize>,
    /// Memory for slices on their way in from peers that lay their cache out otherwise: a frame, rounded up to a power of
    /// two, for each data connection that brings one at the moment. A frame that finds none waits; one of more than an
    /// eighth of it is refused, if it is not one slice.
    pub staging_bytes: usize,
    /// For connecting, for the hellos of a control stream, and for those of a data connection, each.
    pub handshake: Duration,
    /// Attempts to open a control stream, or a data path, before the transfers that wait for it fail. A peer that cuts an
    /// unproven stream for newer ones is asked until their deadlines.
    pub connect_attempts: u32,
    /// After so long, a link whose data path is not over the best transport that both sides have tries a better one again;
    /// twice as long after each attempt, up to 30 times.
    pub better_path: Duration,
    /// A control stream without transfers is closed after this long.
    pub idle_link: Duration,
    /// How long a sealed transfer may wait for slices that are still on their way, or for `Released`; a sender that has
    /// lost the control stream waits so long for another one, and the lease holds again once it stands. A few leases, and
    /// never less than one.
    pub seal_grace: Duration,
    /// How long an aborted transfer lets a frame that is being written finish from its blocks; then zeros follow, marked
    /// as such. Where
    /// the receiver fetches, it may take ten times as long to let go of the sender's blocks; then its path is cut.
    pub fence_grace: Duration,
    /// A data connection on which a frame makes no progress for this long is closed; so is one whose peer does not
    /// acknowledge what was sent. Never less than the lease.
    pub data_stall: Duration,
    /// How often a quiet connection, for control or for data, is asked for a sign of life; a second at least. A third of
    /// the lease, as transfers say theirs.
    pub keep_alive: Duration,
    /// A control connection is given up if it does not answer for this long. Never less than the lease, which a peer
    /// that only pauses may use up.
    pub keep_alive_timeout: Duration,
}

/// TCP's own keep-alive counts in seconds.
const LEAST_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Of any of them, so that what is added to a moment or derived from another has an end that a clock can show.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

impl Default for Limits {
    /// Those for a lease of 3 s.
    fn default() -> Self {
        Self::for_lease(Duration::from_secs(3))
    }
}

impl Limits {
    /// Limits in which every wait for a peer follows from the lease: a few of them, and a second at least.
    ///
    /// A peer that cannot be reached any more, and whose system says nothing, is noticed after a lease by transfers (the
    /// control stream is then given up too), after `keep_alive` and `keep_alive_timeout` by a control stream without
    /// any, and after `data_stall` and a `keep_alive` by a data connection that nothing else has ended.
    pub fn for_lease(lease: Duration) -> Self {
        Self {
            incoming_transfers: 1024,
            outgoing_transfers: 1024,
            held_offers: 256,
            held_offer: (lease * 10).max(Duration::from_secs(5)),
            remembered_transfers: 8192,
            peers: 1024,
            unproven_streams: 1024,
            frame_bytes: 1 << 20,
            send_buffer: None,
            staging_bytes: 256 << 20,
            handshake: (lease * 5 / 3).clamp(Duration::from_secs(1), Duration::from_secs(30)),
            connect_attempts: 4,
            better_path: Duration::from_secs(10),
            idle_link: Duration::from_secs(300),
            seal_grace: (lease * 10 / 3).max(Duration::from_secs(1)),
            fence_grace: (lease / 30).clamp(Duration::from_millis(10), Duration::from_secs(1)),
            data_stall: (lease * 10 / 3).max(Duration::from_secs(1)),
            keep_alive: (lease / 3).clamp(LEAST_KEEP_ALIVE, Duration::from_secs(10)),
            keep_alive_timeout: lease.max(LEAST_KEEP_ALIVE),
        }
    }

    /// A wait for a peer that would end before its lease does, for all of which it may pause.
    fn shorter_than(&self, lease: Duration) -> Option<(&'static str, Duration)> {
        let waits = [
            ("seal_grace", self.seal_grace),
            ("data_stall", self.data_stall),
            ("keep_alive_timeout", self.keep_alive_timeout),
        ];
        waits.into_iter().find(|(_, wait)| *wait < lease)
    }

    /// # Errors
    /// `Invalid`, with the limit that is out of place: 0, longer than a week, or a wait for a peer that is shorter than its
    /// lease.
    pub(super) fn validate(&self, lease: Duration) -> Result<(), TransferError> {
        let bad = |what: &str| Err(TransferError::Invalid(format!("limits of the node: {what}")));
        if self.peers == 0 || self.unproven_streams == 0 {
            return bad("peers and unproven_streams must be at least 1");
        }
        let times = [
            ("held_offer", self.held_offer),
            ("handshake", self.handshake),
            ("better_path", self.better_path),
            ("idle_link", self.idle_link),
            ("seal_grace", self.seal_grace),
            ("fence_grace", self.fence_grace),
            ("data_stall", self.data_stall),
            ("keep_alive_timeout", self.keep_alive_timeout),
        ];
        if let Some((name, _)) = times.iter().find(|(_, time)| time.is_zero()) {
            return bad(&format!("{name} must be more than 0"));
        }
        let beat = ("keep_alive", self.keep_alive);
        if let Some((name, _)) = times.iter().chain([&beat]).find(|(_, time)| *time > LONGEST) {
            return bad(&format!("{name} must be no more than a week"));
        }
        if self.send_buffer == Some(0) {
            return bad("send_buffer must be more than 0; none = as the kernel finds right");
        }
        if self.keep_alive < LEAST_KEEP_ALIVE {
            return bad("keep_alive must be at least 1 s");
        }
        if let Some((name, time)) = self.shorter_than(lease) {
            return bad(&format!(
                "{name} ({time:?}) must be no less than the lease ({lease:?}); see `Limits::for_lease`"
            ));
        }
        if self.fence_grace > self.data_stall {
            return bad("fence_grace must be no more than data_stall, which ends every wait for data");
        }
        if self.connect_attempts == 0 {
            return bad("connect_attempts must be at least 1");
        }
        Ok(())
    }

    /// All that transports wait for.
    pub(super) fn waits(&self) -> Waits {
        Waits::new(self.handshake, self.fence_grace, self.data_stall, self.keep_alive)
    }

    /// What transports are run with, for slices of this size.
    pub(super) fn terms(&self, slice_bytes: u64) -> Result<Terms, TransferError> {
        let slice_bytes = u32::try_from(slice_bytes)
            .map_err(|_| TransferError::Invalid("slices must be smaller than 4 GiB".into()))?;
        Ok(Terms {
            slice_bytes,
            frame_slices: Terms::frame_slices(self.frame_bytes, slice_bytes),
            waits: self.waits(),
            send_buffer: self.send_buffer,
        })
    }

    /// Messages that may wait on a control stream, each way: a handful for each transfer. A fuller queue means a peer
    /// that does not read, and breaks the stream.
    pub(super) fn control_queue(&self) -> usize {
        64 + 4 * (self.incoming_transfers.max(self.outgoing_transfers) + self.held_offers)
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_ends_a_connection_to_a_peer_that_pauses_within_its_lease() {
        for millis in [30, 1000, 3000, 60_000, 3_600_000] {
            let lease = Duration::from_millis(millis);
            let limits = Limits::for_lease(lease);
            assert_eq!(limits.shorter_than(lease), None);
            let Limits { keep_alive, keep_alive_timeout, .. } = limits;
            assert!(keep_alive >= LEAST_KEEP_ALIVE && keep_alive <= keep_alive_timeout);
            assert!(limits.waits().in_order(), "{:?}", limits.waits());
        }
    }

    #[test]
    fn what_transports_wait_for_follows_from_the_limits() {
        let waits = Limits::default().waits();
        let secs = Duration::from_secs_f64;
        assert_eq!((waits.let_go, waits.given_up), (secs(1.0), secs(20.0)));
        assert_eq!((waits.drain, waits.destroy, waits.fence), (secs(0.5), secs(30.0), secs(40.5)));
    }

    /// Of any order of magnitude, and some that no limit may have.
    fn times() -> impl Strategy<Value = Duration> {
        let nanos = (0u32..60).prop_flat_map(|bits| 0..=1u64 << bits).prop_map(Duration::from_nanos);
        prop_oneof![8 => nanos, 1 => Just(LONGEST), 1 => Just(Duration::MAX)]
    }

    proptest! {
        #[test]
        fn waits_are_in_order_whatever_the_limits(
            (data_stall, fence_grace, handshake, keep_alive) in (times(), times(), times(), times()),
        ) {
            let (lease, defaults) = (Duration::from_millis(30), Limits::default());
            let limits = Limits { data_stall, fence_grace, handshake, keep_alive, ..defaults };
            let too_long = [data_stall, fence_grace, handshake, keep_alive].iter().any(|time| *time > LONGEST);
            match limits.validate(lease) {
                Ok(()) => prop_assert!(!too_long && limits.waits().in_order(), "{limits:?}"),
                Err(error) => prop_assert!(matches!(error, TransferError::Invalid(_))),
            }
        }
    }
}
