//! Virtual machine monitor: one process, one microVM.
//!
//! ```text
//!  main thread = I/O thread                        vCPU threads, one each
//!  epoll: mailbox, queue kicks, device             KVM_RUN ─► exit ─► bus ─► serial, I/O APIC, PCI registers
//!  descriptors, console, control, signals                                │
//!        ▲                     │                                         │ messages
//!        │                     └── interrupts (eventfd) ──► KVM          ▼
//!        └─────────────────────────────────────────────────────────── mailbox
//! ```
//!
//! The phases of a VM are the types of [`machine`]; where things are in guest memory is in [`layout`].

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )
)]

pub mod arch;
pub mod boot;
pub mod bus;
pub mod control;
pub mod descriptors;
pub mod devices;
pub mod elf;
pub mod flight;
pub mod gate;
#[cfg(any(test, feature = "guest-driver"))]
pub mod hostile;
pub mod image;
pub mod interrupt;
pub mod ioctl;
pub mod kvm;
pub mod layout;
#[cfg(all(test, loom))]
mod loom_test;
pub mod machine;
pub mod mailbox;
pub mod memory;
pub mod passing;
pub mod pci;
pub mod poll;
pub mod probe;
pub mod sandbox;
pub mod snapshot;
pub mod stats;
pub mod sync;
pub mod times;
pub mod vcpu;
pub mod vcpu_stats;
pub mod virtio;
pub mod worker;

/// An error and its causes as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
