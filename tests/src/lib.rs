//! Harness of the whole-system tests.
//!
//! * [`host`]: one node in the foreground (`blixard dev`) and the commands a user would type
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod host;
