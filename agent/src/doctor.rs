//! Looks at the host: what it has for VMs, and what to do where something is missing. Tries, rather than guesses.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blixard_agent_api::Finding;
use blixard_agent_api::request::FindingState;
use nix::sys::resource::{Resource, getrlimit};
use serde::Deserialize;

use crate::cgroup::{self, CONTROLLERS};
use crate::config::Config;
use crate::volume::file::MKFS;
use crate::{guard, lease};

/// Longest time the VMM may try.
const PROBE_TIME_MAX: Duration = Duration::from_secs(15);
/// Fewest processes and threads of a host for a thousand VMs.
const PIDS_MIN: u64 = 65_536;
/// Fewest descriptors of the agent for a thousand VMs.
const FILES_MIN: u64 = 16_384;
/// Fewest neighbours before the kernel drops some, for a thousand VMs.
const NEIGHBOURS_MIN: u64 = 4096;
/// Least free disk space in bytes before it is worth a warning.
const DISK_MIN: u64 = 5 << 30;

fn finding(check: &str, state: FindingState, found: impl Into<String>, fix: Option<&str>) -> Finding {
    Finding { check: check.into(), state, found: found.into(), fix: fix.map(Into::into) }
}

/// Looks at everything.
pub fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![kvm(&config.vmm), cgroups(config), device_mapper(), tun(), mkfs()];
    findings.push(number(
        "pid_max",
        "/proc/sys/kernel/pid_max",
        PIDS_MIN,
        "sysctl -w kernel.pid_max=4194304 (and a file in /etc/sysctl.d)",
    ));
    findings.push(number(
        "threads-max",
        "/proc/sys/kernel/threads-max",
        PIDS_MIN,
        "sysctl -w kernel.threads-max=4194304 (and a file in /etc/sysctl.d)",
    ));
    findings.push(files());
    findings.push(number(
        "neighbour table",
        "/proc/sys/net/ipv4/neigh/default/gc_thresh3",
        NEIGHBOURS_MIN,
        "sysctl -w net.ipv4.neigh.default.gc_thresh3=65536 (and gc_thresh2, and net.ipv6)",
    ));
    findings.push(disk(&config.state));
    findings.extend(lease_guard(config));
    findings
}

/// Nothing where this host has no leases.
fn lease_guard(config: &Config) -> Option<Finding> {
    let check = "lease guard";
    let fix = "systemctl enable --now blixard-guard.service";
    if !lease::marked(&config.state) || config.no_cgroup {
        return None;
    }
    Some(match guard::lives(&config.run) {
        Ok(true) => finding(check, FindingState::Ok, "runs", None),
        Ok(false) => finding(
            check,
            FindingState::Warning,
            "does not run: an agent that is dead when the lease ends leaves VMs running here and elsewhere",
            Some(fix),
        ),
        Err(error) => finding(check, FindingState::Warning, format!("cannot be looked for: {error}"), None),
    })
}

/// The answer of `blixard-vmm probe --json`.
#[derive(Debug, Deserialize)]
struct Probe {
    guests: String,
    #[serde(default)]
    reason: String,
}

fn kvm(vmm: &Path) -> Finding {
    let check = "/dev/kvm";
    let fix = "load kvm_intel or kvm_amd, enable virtualisation in the firmware, or give this machine nested virtualisation";
    let bad = |found: String, fix: &str| finding(check, FindingState::Bad, found, Some(fix));
    let probe = match probe(vmm) {
        Ok(probe) => probe,
        Err(reason) => {
            let found = format!("cannot ask {}: {reason}", vmm.display());
            return bad(found, "install blixard-vmm beside blixard-agent, or name it with --vmm");
        }
    };
    match probe.guests.as_str() {
        "linux_guests" => finding(check, FindingState::Ok, "runs Linux guests", None),
        "small_guests_only" => bad(format!("runs no Linux guest: {}", probe.reason), fix),
        _ => bad(probe.reason, fix),
    }
}

fn probe(vmm: &Path) -> Result<Probe, String> {
    let mut command = Command::new(vmm);
    command.args(["probe", "--json"]).env_clear().stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let output = child.stdout.take();
    let deadline = Instant::now() + PROBE_TIME_MAX;
    let ended = crate::process::open(i32::try_from(child.id()).unwrap_or(-1))
        .map_err(|e| e.to_string())
        .is_ok_and(|process| crate::process::wait_until(&process, deadline));
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
        return Err("no answer in time".into());
    }
    let _ = child.wait();
    let mut text = String::new();
    if let Some(output) = output {
        output.take(64 << 10).read_to_string(&mut text).map_err(|e| e.to_string())?;
    }
    serde_json::from_str(&text).map_err(|_| "its answer is not understood".into())
}

fn cgroups(config: &Config) -> Finding {
    let check = "cgroup v2";
    let fix = "boot with systemd.unified_cgroup_hierarchy=1, and start the agent with --cgroup /sys/fs/cgroup/blixard";
    let bad = |found: String| finding(check, FindingState::Bad, found, Some(fix));
    if config.no_cgroup {
        return finding(check, FindingState::Warning, "VMs run without limits (--no-cgroup)", Some(fix));
    }
    let root = match config.cgroup.clone().map_or_else(cgroup::own, Ok) {
        Ok(root) => root,
        Err(error) => return bad(crate::host::sentence(&error)),
    };
    // Before the agent has made it, its parent tells.
    let place = root.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let Ok(offered) = fs::read_to_string(place.join("cgroup.controllers")) else {
        return bad(format!("{} is not in a cgroup v2 hierarchy", root.display()));
    };
    let offered: Vec<&str> = offered.split_ascii_whitespace().collect();
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|c| !offered.contains(c)).collect();
    if missing.is_empty() {
        return finding(
            check,
            FindingState::Ok,
            format!("{} has {}", place.display(), offered.join(" ")),
            None,
        );
    }
    bad(format!("{} has no controller {}", place.display(), missing.join(", ")))
}

fn device_mapper() -> Finding {
    let check = "device mapper";
    let fix = "modprobe dm_thin_pool";
    let loaded = Path::new("/sys/module/dm_thin_pool").exists();
    let control = Path::new("/dev/mapper/control").exists();
    match (control, loaded) {
        (true, true) => finding(check, FindingState::Ok, "thin pools are possible", None),
        (true, false) => {
            finding(check, FindingState::Warning, "dm_thin_pool is not loaded; volumes are files", Some(fix))
        }
        _ => finding(check, FindingState::Warning, "no device mapper; volumes are files", Some(fix)),
    }
}

fn tun() -> Finding {
    if Path::new("/dev/net/tun").exists() {
        finding("/dev/net/tun", FindingState::Ok, "there", None)
    } else {
        let found = "missing: VMs cannot have a nic";
        finding("/dev/net/tun", FindingState::Bad, found, Some("modprobe tun"))
    }
}

fn mkfs() -> Finding {
    match MKFS.iter().find(|path| Path::new(path).exists()) {
        Some(path) => finding("mkfs.ext4", FindingState::Ok, *path, None),
        None => finding(
            "mkfs.ext4",
            FindingState::Bad,
            "missing: volumes cannot be made",
            Some("install the package e2fsprogs"),
        ),
    }
}

fn number(check: &str, path: &str, least: u64, fix: &str) -> Finding {
    let value = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    match value {
        None => finding(check, FindingState::Warning, format!("{path} cannot be read"), None),
        Some(value) if value < least => {
            finding(check, FindingState::Warning, format!("{value}: too few for a thousand VMs"), Some(fix))
        }
        Some(value) => finding(check, FindingState::Ok, value.to_string(), None),
    }
}

fn files() -> Finding {
    let check = "nofile";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard < FILES_MIN => {
            let found = format!("{hard}: too few for a thousand VMs");
            finding(check, FindingState::Warning, found, Some("LimitNOFILE=1048576 in the agent's unit"))
        }
        Ok((_, hard)) => finding(check, FindingState::Ok, hard.to_string(), None),
        Err(errno) => finding(check, FindingState::Warning, format!("cannot be read: {errno}"), None),
    }
}

fn disk(state: &Path) -> Finding {
    let place = state.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statvfs::statvfs(place) {
        Ok(disk) => {
            let free = disk.blocks_available().saturating_mul(disk.fragment_size());
            let found = format!("{} MiB free in {}", free >> 20, place.display());
            if free < DISK_MIN {
                finding(
                    "free disk",
                    FindingState::Warning,
                    found,
                    Some("free some space, or choose another --state"),
                )
            } else {
                finding("free disk", FindingState::Ok, found, None)
            }
        }
        Err(errno) => {
            finding("free disk", FindingState::Warning, format!("{}: {errno}", place.display()), None)
        }
    }
}
