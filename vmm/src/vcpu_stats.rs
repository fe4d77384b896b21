//! What a vCPU thread counts: its exits by reason, and how long answering one takes.
//!
//! Only the thread itself writes, so a count is a load and a store of its own cache line; the I/O thread reads. Every
//! [`SAMPLED`]th exit is timed.

use std::sync::atomic::{AtomicU64, Ordering};

use blixard_vmm_api::stats::{self, BUCKETS_MAX};
use kvm_ioctls::VcpuExit;

use crate::stats::{Samples, bucket, read};

/// One exit in so many is timed.
pub const SAMPLED: u64 = 64;

/// Exits by reason, in the order of [`reason`].
const NAMES: [&str; 9] = [
    "exits_port_write",
    "exits_port_read",
    "exits_memory_write",
    "exits_memory_read",
    "exits_interrupted",
    "exits_end_of_interrupt",
    "exits_halt",
    "exits_system_event",
    "exits_other",
];

/// Place in [`NAMES`].
fn reason(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> usize {
    match exit {
        Ok(VcpuExit::IoOut(..)) => 0,
        Ok(VcpuExit::IoIn(..)) => 1,
        Ok(VcpuExit::MmioWrite(..)) => 2,
        Ok(VcpuExit::MmioRead(..)) => 3,
        Ok(VcpuExit::Intr) | Err(_) => 4,
        Ok(VcpuExit::IoapicEoi(_)) => 5,
        Ok(VcpuExit::Hlt) => 6,
        Ok(VcpuExit::SystemEvent(..)) => 7,
        Ok(_) => 8,
    }
}

/// Counters of one vCPU thread.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct VcpuStats {
    exits: [AtomicU64; NAMES.len()],
    all: AtomicU64,
    nanoseconds: AtomicU64,
    handling: [AtomicU64; BUCKETS_MAX],
}

fn add(counter: &AtomicU64, count: u64) -> u64 {
    // The only writer is the thread that calls: no other addition can be lost.
    let new = counter.load(Ordering::Relaxed).wrapping_add(count);
    counter.store(new, Ordering::Relaxed);
    new
}

impl VcpuStats {
    /// Counts an exit. When it is one that is timed: the time of now, for [`Self::handled`].
    pub fn count(&self, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<u64> {
        if let Some(counter) = self.exits.get(reason(exit)) {
            add(counter, 1);
        }
        add(&self.all, 1).is_multiple_of(SAMPLED).then(now_ns)
    }

    /// The exit that began to be handled at `begin` has been.
    pub fn handled(&self, begin: u64) {
        let time = now_ns().saturating_sub(begin);
        add(&self.nanoseconds, time);
        if let Some(counter) = self.handling.get(bucket(time)) {
            add(counter, 1);
        }
    }

    /// Adds what was counted to `samples`.
    pub fn read(&self, samples: &mut Samples) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for (name, counter) in NAMES.iter().zip(&self.exits) {
            samples.counters(None, &[(name, load(counter))]);
        }
        samples.spread(None, "sampled_exit_ns", self.times());
    }

    fn times(&self) -> stats::Histogram {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        read(load(&self.nanoseconds), &self.handling.each_ref().map(load))
    }
}

fn now_ns() -> u64 {
    crate::virtio::rate::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_reason_and_one_in_so_many_is_timed() {
        let stats = VcpuStats::default();
        let mut timed = 0;
        for _ in 0..3 * SAMPLED {
            if let Some(begin) = stats.count(&Ok(VcpuExit::MmioWrite(0, &[]))) {
                stats.handled(begin);
                timed += 1;
            }
        }
        stats.count(&Ok(VcpuExit::Hlt));
        assert_eq!((timed, stats.times().count()), (3, 3));
        let mut samples = Samples::default();
        stats.read(samples.of("vcpu0"));
        let page = samples.page(0);
        let count = |name: &str| {
            let sample = page.samples.iter().find(|sample| sample.name == name).unwrap();
            sample.value.clone()
        };
        assert_eq!(count("exits_memory_write"), stats::Value::Count(3 * SAMPLED));
        assert_eq!(count("exits_halt"), stats::Value::Count(1));
    }
}
