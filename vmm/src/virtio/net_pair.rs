//! A pair of queues that we serve: when each direction runs, and what of the tap is watched for it.

use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::device::{GuestMemory, Interrupt, Watch};
use super::net_queues::{FromGuest, Host, NetFailure, Stop, ToGuest};
use super::queue::Queue;
use super::rate::Limiter;

/// Which directions have a reason to run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) receive: bool,
    pub(super) send: bool,
}

impl Due {
    pub(super) const BOTH: Self = Self { receive: true, send: true };

    fn any(self) -> bool {
        self.receive || self.send
    }
}

/// The limits of a card, over all its pairs.
#[derive(Default)]
pub(super) struct Limits {
    pub(super) receive: Option<Limiter>,
    pub(super) send: Option<Limiter>,
}

/// The pair.
pub(super) struct Pair {
    pub(super) to_guest: ToGuest,
    pub(super) from_guest: FromGuest,
    /// Why each direction stopped: only what ends that runs it again.
    received: Stop,
    sent: Stop,
    /// What of the tap is watched, under `token`.
    watched: u32,
    token: u64,
}

impl Pair {
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        (receiving, sending): (Queue, Queue),
        mergeable: bool,
        token: u64,
    ) -> Self {
        Self {
            to_guest: ToGuest::new(memory, receiving, mergeable),
            from_guest: FromGuest::new(memory, sending),
            received: Stop::Driver,
            sent: Stop::Driver,
            watched: 0,
            token,
        }
    }

    /// What a kick of its receiving or its sending queue is a reason for.
    pub(super) fn on_kick(&self, sending: bool) -> Due {
        Due { receive: !sending && self.received == Stop::Driver, send: sending && self.sent == Stop::Driver }
    }

    /// What an event of the tap is a reason for.
    pub(super) fn on_tap(&mut self, events: u32, host: &Host, watch: &mut dyn Watch) -> Due {
        let is = |event: EventSet| events & event.bits() != 0;
        let waits = |stop| matches!(stop, Stop::Tap | Stop::Turn);
        if is(EventSet::IN) && !waits(self.received) {
            // There is a frame and no place for it: now it is worth a call not to be told of it all the time.
            let wanted = self.watched & !EventSet::IN.bits();
            self.watch(host, wanted, watch);
        }
        Due { receive: is(EventSet::IN) && waits(self.received), send: is(EventSet::OUT) && waits(self.sent) }
    }

    /// What runs again after `stop` has passed.
    pub(super) fn after(&self, stop: Stop) -> Due {
        Due { receive: self.received == stop, send: self.sent == stop }
    }

    /// A turn of the directions that are due; true when there is more to do.
    pub(super) fn serve(
        &mut self,
        due: Due,
        host: &mut Host,
        limits: &mut Limits,
        interrupt: &dyn Interrupt,
        watch: &mut dyn Watch,
    ) -> Result<bool, NetFailure> {
        if !due.any() {
            return Ok(false);
        }
        let before = host.counts.received;
        let received =
            if due.receive { self.to_guest.run(host, &mut limits.receive) } else { Ok(self.received) };
        host.counts.batch(host.counts.received - before);
        let sent = if due.send { self.from_guest.run(host, &mut limits.send) } else { Ok(self.sent) };
        // One index update and at most one interrupt for all frames of the turn.
        for queue in [&mut self.to_guest.queue, &mut self.from_guest.queue] {
            if queue.publish()? {
                host.counts.interrupts += 1;
                interrupt.used(queue.index());
            }
        }
        (self.received, self.sent) = (received?, sent?);
        // To be told of frames is kept as long as it does no harm: a driver that is short of buffers has new ones soon.
        let mut wanted = self.watched & EventSet::IN.bits();
        if self.received == Stop::Tap {
            wanted |= EventSet::IN.bits();
        }
        if self.sent == Stop::Tap {
            wanted |= EventSet::OUT.bits();
        }
        self.watch(host, wanted, watch);
        Ok(self.received == Stop::Turn || self.sent == Stop::Turn)
    }

    /// Takes and gives no frame any more.
    pub(super) fn stop(&mut self, host: &Host, watch: &mut dyn Watch) {
        self.to_guest.stop();
        self.from_guest.stop();
        self.watch(host, 0, watch);
    }

    pub(super) fn unwatch(&mut self, host: &Host, watch: &mut dyn Watch) {
        self.watch(host, 0, watch);
    }

    fn watch(&mut self, host: &Host, wanted: u32, watch: &mut dyn Watch) {
        // Errors and hang-ups are reported in any case: a tap that is gone would wake us for ever.
        let wanted = if host.gone { 0 } else { wanted };
        let fd = host.tap.raw_fd();
        let result = match (self.watched, wanted) {
            (before, after) if before == after => return,
            (0, _) => watch.add(fd, wanted, self.token),
            (_, 0) => {
                watch.remove(fd);
                Ok(())
            }
            _ => watch.modify(fd, wanted, self.token),
        };
        if result.is_ok() {
            self.watched = wanted;
        }
    }
}
