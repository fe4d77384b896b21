//! A network card whose queues the kernel serves (vhost-net): handing them over, taking them back.

use vmm_sys_util::epoll::EventSet;

use super::device::{Interrupt, Watch};
use super::net::{Active, KERNEL_FIRST, Net};
use super::net_pair::Pair;
use super::net_queues::{Host, NetFailure};
use super::queue::Queue;
use super::vhost_net::{Ring, Vhost, VhostError};

impl Net {
    /// Hands the pairs over to the kernel; false when it does not take them and we have to serve them.
    pub(super) fn enter_kernel(&mut self, active: &Active, watch: &mut dyn Watch) -> bool {
        if self.vhost.is_empty() {
            return false;
        }
        for (number, vhost) in self.vhost.iter_mut().enumerate() {
            let (Some(pair), Some(host)) = (active.pairs.get(number), self.hosts.get(number)) else { break };
            if let Err(error) = hand_over(vhost, pair, host, active) {
                self.kernel_refusals += 1;
                drop(error);
                for vhost in &mut self.vhost {
                    vhost.pause();
                }
                return false;
            }
        }
        for (number, vhost) in (0u64..).zip(&self.vhost) {
            // Without the watch a broken ring is silent, as a driver deserves that breaks it.
            let _ = watch.add(vhost.error_fd(), EventSet::IN.bits(), KERNEL_FIRST + number);
        }
        for pair in &active.pairs {
            for queue in [&pair.to_guest.queue, &pair.from_guest.queue] {
                if let Some(fd) = active.interrupt.kick_fd(queue.index()) {
                    watch.remove(fd);
                }
            }
        }
        true
    }

    pub(super) fn leave_kernel(&mut self, watch: &mut dyn Watch) {
        if !self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.kernel)) {
            return;
        }
        for vhost in &mut self.vhost {
            watch.remove(vhost.error_fd());
            // Where it stopped matters to nobody: the driver resets the device.
            let _place = vhost.stop();
        }
    }

    pub(super) fn pause_kernel(&mut self, watch: &mut dyn Watch) {
        let mut result = Ok(());
        for (vhost, host) in self.vhost.iter_mut().zip(&self.hosts) {
            if self.paused {
                vhost.pause();
            } else if vhost.resume(host.tap.raw_fd()).is_err() {
                result = Err(NetFailure::Kernel);
            }
        }
        self.end(result, watch);
    }
}

fn hand_over(vhost: &mut Vhost, pair: &Pair, host: &Host, active: &Active) -> Result<(), VhostError> {
    let ring = |queue| ring(queue, &*active.interrupt).ok_or(VhostError::Events(Queue::index(queue)));
    let rings = [ring(&pair.to_guest.queue)?, ring(&pair.from_guest.queue)?];
    vhost.start(&rings, active.features, &active.memory, host.tap.raw_fd())
}

fn ring<'a>(queue: &'a Queue, interrupt: &dyn Interrupt) -> Option<Ring<'a>> {
    let index = queue.is_enabled().then_some(queue.index())?;
    Some(Ring { queue, kick: interrupt.kick_fd(index)?, call: interrupt.call_fd(index)? })
}
