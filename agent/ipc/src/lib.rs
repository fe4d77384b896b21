//! Bounded SEQPACKET messages with passed descriptors between the processes of one node.
//!
//! A *message* is JSON of a type that both sides know, and up to [`DESCRIPTORS_MAX`] descriptors. It travels as one or more
//! datagrams ([`mod@frame`]); the descriptors ride on the first. Every receive has a byte limit, every call a deadline.
//! A side that sends something else is cut off.
//!
//! A call is one request and one reply on a [`Connection`]; requests of one connection are answered in order.

pub mod connection;
pub mod frame;
pub mod peer;

pub use connection::{Connection, IpcError, Listener, Message};
pub use peer::Peer;

/// Most descriptors of one message.
pub const DESCRIPTORS_MAX: usize = 16;
/// Largest message that any process of Blixard accepts, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
