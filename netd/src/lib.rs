//! Bridges, TAPs, addresses and packet filter of one node.
//!
//! The kernel is the only state: what exists is read back from it, compared with what shall be, and repaired. netd can be
//! killed at any instant; the next `ensure` finishes what was begun.
//!
//! * [`node`]: the networks and nics of this node; [`network`] and [`nic`] hold the steps of each
//! * [`firewall`]: what may pass, as a value, as text for nft and read back from it; [`nft`] runs nft,
//!   [`generation`] tells whether that is needed
//! * [`link`]: interfaces, addresses and forwarding entries by rtnetlink
//! * [`tap`]: TAP devices; [`raw`] holds the only `unsafe` code
//! * [`sysctl`]: switches under `/proc/sys/net`
//! * [`check`]: what a request may contain
//! * [`server`], [`privileges`]: who may ask, and with how little netd runs
#![deny(unsafe_code)]

pub mod check;
pub mod error;
pub mod firewall;
pub mod generation;
pub mod link;
pub mod network;
pub mod nft;
pub mod nic;
pub mod node;
pub mod privileges;
pub mod raw;
pub mod server;
pub mod sysctl;
pub mod tap;

pub use node::Node;
