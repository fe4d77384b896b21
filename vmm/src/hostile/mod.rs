//! Bytes become what a hostile guest, file or client does: one function per stream of bytes that somebody else controls.
//!
//! Nothing here knows what the right answer is; the code under test only must not panic, hang, grow or touch what is not its
//! own. The fuzz targets of the same names (`fuzz/`) find the bytes; a test replays what they found, and random ones.

#![cfg_attr(
    not(test),
    expect(
        clippy::unwrap_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        reason = "a tool of tests: where it cannot go on, the test has failed"
    )
)]

mod control;
mod devices;
mod driver;
mod kernel;
mod network;
mod registers;
#[cfg(test)]
mod replay_test;
mod serial;
mod snapshot;

/// Something that takes bytes of a stranger.
pub type Target = fn(&[u8]);

/// All of them, by the names of the fuzz targets.
pub const TARGETS: [(&str, Target); 13] = [
    ("balloon", devices::balloon),
    ("block", devices::block),
    ("config", kernel::config),
    ("control", control::control),
    ("kernel_load", kernel::kernel_load),
    ("net", network::net),
    ("pci", registers::pci),
    ("pmem", devices::pmem),
    ("rng", devices::rng),
    ("serial", serial::serial),
    ("snapshot", snapshot::snapshot),
    ("transport_state", registers::transport_state),
    ("vsock", network::vsock),
];

/// Gives `data` to the target of this name.
///
/// # Panics
/// There is none, or it has found something.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.unwrap_or_else(|| panic!("no target {name}"));
    target(data);
}

/// Bytes that are used up.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// These bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte; 0 behind the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next `count` bytes, or what is left.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    /// The next two bytes as a number.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next four bytes as a number.
    pub fn word(&mut self) -> u32 {
        u32::from(self.short()) | u32::from(self.short()) << 16
    }

    /// The next eight bytes as a number.
    pub fn long(&mut self) -> u64 {
        u64::from(self.word()) | u64::from(self.word()) << 32
    }

    /// Whether all is used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
