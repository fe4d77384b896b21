//! Harness of the whole-system tests.
//!
//! * [`sim_agent`]: an agent without a host, for control planes on any machine
//! * [`hosts`]: several hosts of the rig with everything installed
//! * [`host`]: one node in the foreground (`blixard dev`) and the commands a user would type
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod host;
pub mod hosts;
pub mod sim_agent;
