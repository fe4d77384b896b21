//! Switches under `/proc/sys/net`. CAP_NET_ADMIN in the network namespace suffices to write them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Folder of all switches.
const ROOT: &str = "/proc/sys";

/// A switch that cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// It cannot be written.
    #[error("cannot set {name}; run as root: sysctl -w {name}={value}")]
    Write {
        /// Name with dots.
        name: String,
        /// What it shall be.
        value: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The interfaces cannot be listed.
    #[error("cannot list the interfaces in {ROOT}/net/ipv6/conf")]
    List(#[source] io::Error),
}

/// Lets the host forward packets of IPv4.
///
/// # Errors
/// [`SysctlError::Write`]; not when it already is so.
pub fn forward_v4() -> Result<(), SysctlError> {
    set("net/ipv4/ip_forward", "1")
}

/// Lets the host forward packets of IPv6.
///
/// A forwarding host no longer believes router advertisements unless told to, and would lose its own address and route:
/// interfaces that believed them until now are told to go on.
///
/// # Errors
/// As [`forward_v4`].
pub fn forward_v6() -> Result<(), SysctlError> {
    const ALL: &str = "net/ipv6/conf/all/forwarding";
    if is(ALL, "1") {
        return Ok(());
    }
    let interfaces = fs::read_dir(Path::new(ROOT).join("net/ipv6/conf")).map_err(SysctlError::List)?;
    for interface in interfaces {
        let interface = interface.map_err(SysctlError::List)?.file_name();
        let Some(interface) = interface.to_str() else { continue };
        let accept = format!("net/ipv6/conf/{interface}/accept_ra");
        // Interfaces that come later keep the kernel's default: a bridge or container must not be believed.
        if !["all", "default"].contains(&interface)
            && is(&accept, "1")
            && is(&format!("net/ipv6/conf/{interface}/forwarding"), "0")
        {
            set(&accept, "2")?;
        }
    }
    set(ALL, "1")
}

fn set(switch: &str, value: &'static str) -> Result<(), SysctlError> {
    if is(switch, value) {
        return Ok(());
    }
    fs::write(path(switch), value).map_err(|source| SysctlError::Write {
        name: switch.replace('/', "."),
        value,
        source,
    })
}

fn is(switch: &str, value: &str) -> bool {
    fs::read_to_string(path(switch)).is_ok_and(|found| found.trim() == value)
}

fn path(switch: &str) -> PathBuf {
    Path::new(ROOT).join(switch)
}
