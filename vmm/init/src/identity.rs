//! A VM that goes on from a snapshot, or is a fork, becomes somebody else: time, random numbers, host name.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use blixard_vmm_api::guest::Identity;

use crate::{console, sys};

/// Takes the identity on. What fails is said on the console; the rest is done.
pub fn refresh(identity: &Identity) {
    if let Err(error) = sys::set_clock(Duration::from_nanos(identity.unix_ns)) {
        console::line(&format!("clock: {error}"));
    }
    let reseeded = File::open("/dev/urandom").and_then(|random| sys::reseed(random.as_fd(), &identity.seed));
    if let Err(error) = reseeded {
        console::line(&format!("random numbers: {error}"));
    }
    if !identity.hostname.is_empty()
        && let Err(error) = nix::unistd::sethostname(&identity.hostname)
    {
        console::line(&format!("host name: {error}"));
    }
}
