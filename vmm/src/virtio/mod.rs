//! Virtio devices: the contract, the queues and the devices.

pub mod backing;
pub mod balloon;
mod balloon_release;
#[cfg(test)]
mod balloon_test;
pub mod block;
mod block_counts;
pub mod block_engine;
pub mod block_request;
#[cfg(test)]
mod block_test;
pub mod chain;
pub mod device;
pub mod failure;
#[cfg(any(test, feature = "guest-driver"))]
pub mod guest_driver;
pub mod iovec;
pub mod net;
mod net_control;
#[cfg(test)]
mod net_control_test;
mod net_features;
mod net_kernel;
mod net_pair;
pub mod net_parts;
mod net_queues;
pub mod net_tap;
#[cfg(test)]
mod net_test;
pub mod pmem;
#[cfg(test)]
mod pmem_test;
pub mod queue;
#[cfg(test)]
mod queue_test;
pub mod rate;
pub mod rng;
pub mod socket;
pub mod transport;
mod transport_state;
#[cfg(test)]
mod transport_test;
pub mod turn;
pub mod vhost_net;
pub mod vsock;
mod vsock_clients;
#[cfg(test)]
mod vsock_echo_test;
pub mod vsock_hook;
#[cfg(test)]
mod vsock_hook_test;
pub mod vsock_link;
pub mod vsock_packet;
pub mod vsock_stream;
#[cfg(test)]
mod vsock_test;
