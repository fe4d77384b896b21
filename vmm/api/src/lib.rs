//! Words shared by agent, VMM and guest. Types and their checks only: no I/O, no clock, no randomness.
//!
//! * [`id`]: the identity of a VM
//! * [`config`]: everything one VMM process is given, by descriptor name
//! * [`cpu`]: what guests may use of a processor; [`snapshot`]: where a restored VM comes from
//! * [`control`]: what may be asked of a running VMM, and the events it sends
//! * [`exit`]: why a VM ended, as a value and as a process exit code
//! * [`guest`]: what the host tells the guest at boot, and the messages between both over vsock
//! * [`health`]: whether the workload does its work
//! * [`rate`]: how fast a device may be
//! * [`stats`]: what a VMM counts, and the events of its flight recorder
#![forbid(unsafe_code)]

pub mod config;
pub mod control;
pub mod cpu;
pub mod exit;
pub mod guest;
pub mod health;
pub mod id;
pub mod rate;
pub mod snapshot;
pub mod stats;

pub use config::VmConfig;
pub use exit::ExitReason;
pub use id::VmId;
