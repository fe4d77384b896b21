//! How a device stops when its driver's memory is nonsense: it says so once, keeps the reason and waits for a reset.

use std::error::Error;

use super::device::Interrupt;

/// Failures of one device.
#[derive(Debug, Default)]
pub struct Failure {
    reason: Option<String>,
    count: u64,
}

impl Failure {
    /// Remembers the reason and tells the driver.
    pub fn note(&mut self, error: &dyn Error, interrupt: &dyn Interrupt) {
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            reason = format!("{reason}: {error}");
            cause = error.source();
        }
        self.reason = Some(reason);
        self.count += 1;
        interrupt.needs_reset();
    }

    /// The driver reset the device.
    pub fn clear(&mut self) {
        self.reason = None;
    }

    /// Why the device waits for a reset, if it does.
    pub fn reason(&self) -> Option<String> {
        self.reason.clone()
    }

    /// How often the device failed.
    pub fn count(&self) -> u64 {
        self.count
    }
}
