//! When things of a boot happened, written once each by whatever thread sees them.

use std::sync::atomic::{AtomicU64, Ordering};

use blixard_vmm_api::control::BootTimes;

/// A moment of the boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// `main` began.
    ProcessStart = 0,
    /// The first vCPU is about to run.
    VcpuStart,
    /// First byte on the serial console.
    FirstSerial,
    /// Init connected to the guest link.
    InitStart,
    /// Init reported ready.
    GuestReady,
    /// The boot timer was written.
    BootTimer,
}

/// All moments, in microseconds of CLOCK_MONOTONIC; 0 is not reached.
#[derive(Debug, Default)]
pub struct Times([AtomicU64; 6]);

/// Microseconds of CLOCK_MONOTONIC now.
pub fn now_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec) * 1_000_000 + part(now.tv_nsec) / 1000
}

impl Times {
    /// Notes that `moment` is now; true when it was not noted before.
    pub fn note(&self, moment: Moment) -> bool {
        let Some(cell) = self.0.get(moment as usize) else { return false };
        cell.load(Ordering::Relaxed) == 0
            && cell.compare_exchange(0, now_us(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// All moments that were reached.
    pub fn all(&self) -> BootTimes {
        let [process, vcpu, serial, init, ready, timer] =
            self.0.each_ref().map(|t| Some(t.load(Ordering::Relaxed)).filter(|t| *t != 0));
        BootTimes {
            process_start_us: process,
            vcpu_start_us: vcpu,
            first_serial_us: serial,
            init_start_us: init,
            guest_ready_us: ready,
            boot_timer_us: timer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_time_counts() {
        let times = Times::default();
        assert!(times.note(Moment::FirstSerial));
        let first = times.all();
        assert!(!times.note(Moment::FirstSerial));
        assert_eq!(times.all(), first);
        assert_eq!(first.boot_timer_us, None);
    }
}
