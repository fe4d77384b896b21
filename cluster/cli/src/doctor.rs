//! `doctor`: what on this host keeps VMs from running, and what to do about it. Works without a node.
//!
//! Three sources: what any user can see, what the agent and the VMM find when they look themselves (as root they see more),
//! and what a running node reports. Of two findings about the same thing the worse one is shown.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::time::Duration;

use blixard_api::client::ClientError;
use blixard_api::server::Finding;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::Context;
use crate::args::Doctor;
use crate::error::{CliError, code};
use crate::output::{Table, printable};
use crate::programs;

/// Longest time that the agent's and the VMM's own checks take.
const CHECK_TIME: Duration = Duration::from_secs(30);

/// The cgroup that `blixard dev` makes.
const CGROUP: &str = "/sys/fs/cgroup/blixard";

const OK: &str = "ok";
const WARNING: &str = "warning";
const BAD: &str = "bad";

/// `doctor`.
pub async fn doctor(context: &Context, options: &Doctor) -> Result<u8, CliError> {
    let root = nix::unistd::geteuid().is_root();
    if options.fix && !root {
        return Err(CliError::Vm {
            message: "doctor --fix changes this host".into(),
            suggestion: "sudo blixard doctor --fix".into(),
            code: code::DENIED,
        });
    }
    let mut findings = own(Path::new("/"));
    if options.fix {
        fix(Path::new("/"), &mut findings);
    }
    let folder = options.bin_dir.as_deref();
    // The agent asks the VMM as well.
    merge(&mut findings, if root { agent(folder).await } else { probe(folder).await });
    merge(&mut findings, node(context).await);
    show(context, &findings)?;
    Ok(if findings.iter().any(|f| f.state == BAD) { code::ERROR } else { 0 })
}

fn finding(check: &str, state: &str, found: impl Into<String>, fix: Option<&str>) -> Finding {
    Finding { check: check.into(), state: state.into(), found: found.into(), fix: fix.map(Into::into) }
}

/// What any user can see. `root` is `/` but in tests.
fn own(root: &Path) -> Vec<Finding> {
    let mut findings = vec![kvm(root), cgroup(root), device_mapper(root), tun(root), kernel(root)];
    findings.extend(LIMITS.iter().map(|limit| limit.look(root)));
    findings
}

fn kvm(root: &Path) -> Finding {
    let check = "/dev/kvm";
    match OpenOptions::new().read(true).write(true).open(root.join("dev/kvm")) {
        Ok(_) => finding(check, OK, "/dev/kvm can be opened", None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let flags = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
            let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
            let (found, fix) = if has("vmx") {
                ("/dev/kvm is not there, the processor has VT-x", "modprobe kvm_intel")
            } else if has("svm") {
                ("/dev/kvm is not there, the processor has AMD-V", "modprobe kvm_amd")
            } else {
                (
                    "/dev/kvm is not there and the processor shows no virtualisation",
                    "switch on VT-x or AMD-V in the firmware, or nested virtualisation on the host of this machine",
                )
            };
            finding(check, BAD, found, Some(fix))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            finding(check, OK, "/dev/kvm is there; this user may not open it, the agent (root) may", None)
        }
        Err(error) => finding(check, BAD, format!("/dev/kvm cannot be opened: {error}"), None),
    }
}

fn cgroup(root: &Path) -> Finding {
    let check = "cgroup v2";
    let fix = "boot with systemd.unified_cgroup_hierarchy=1 (without it VMs run without limits)";
    let Ok(text) = fs::read_to_string(root.join("sys/fs/cgroup/cgroup.controllers")) else {
        return finding(check, WARNING, "cgroup v2 is not mounted at /sys/fs/cgroup", Some(fix));
    };
    let there: Vec<&str> = text.split_whitespace().collect();
    let missing: Vec<&str> = ["cpu", "memory", "pids"].into_iter().filter(|c| !there.contains(c)).collect();
    if missing.is_empty() {
        return finding(check, OK, format!("controllers {}", there.join(" ")), None);
    }
    let found = format!("controllers missing: {}", missing.join(" "));
    finding(
        check,
        WARNING,
        found,
        Some("boot without cgroup_disable= and without mounting them as cgroup v1"),
    )
}

fn device_mapper(root: &Path) -> Finding {
    let check = "device mapper";
    if root.join("dev/mapper/control").exists() {
        return finding(check, OK, "/dev/mapper/control is there", None);
    }
    let found = "no /dev/mapper/control: volumes are files";
    finding(check, WARNING, found, Some("modprobe dm_thin_pool"))
}

fn tun(root: &Path) -> Finding {
    let check = "/dev/net/tun";
    if root.join("dev/net/tun").exists() {
        return finding(check, OK, "/dev/net/tun is there", None);
    }
    finding(check, BAD, "no /dev/net/tun: VMs get no network", Some("modprobe tun"))
}

fn kernel(root: &Path) -> Finding {
    let check = "guest kernel";
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let image = format!("boot/vmlinuz-{release}");
    let modules = root.join("lib/modules").join(release);
    let fix = "blixard kernel import --kernel FILE --modules DIR";
    match (File::open(root.join(&image)), modules.is_dir()) {
        (Ok(_), true) => finding(check, OK, format!("this host's own: {release}"), None),
        (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => finding(
            check,
            WARNING,
            format!("/{image} is readable for root only"),
            Some("sudo blixard kernel import"),
        ),
        (Err(_), _) => finding(check, WARNING, format!("this host's own is not at /{image}"), Some(fix)),
        (Ok(_), false) => finding(check, WARNING, format!("no modules at /lib/modules/{release}"), Some(fix)),
    }
}

/// A number below `/proc/sys` that limits how many VMs a host runs.
struct Limit {
    check: &'static str,
    file: &'static str,
    /// Enough for a thousand VMs.
    least: u64,
    /// What `--fix` sets.
    set: u64,
}

/// Each VM has a process with a thread per vCPU and device, open files, and addresses. A check has the name that the
/// agent gives it.
const LIMITS: [Limit; 5] = [
    Limit { check: "pid_max", file: "kernel/pid_max", least: 65_536, set: 4_194_304 },
    Limit { check: "threads-max", file: "kernel/threads-max", least: 65_536, set: 4_194_304 },
    Limit { check: "file-max", file: "fs/file-max", least: 1_000_000, set: 4_000_000 },
    Limit { check: "neighbour table", file: "net/ipv4/neigh/default/gc_thresh3", least: 4096, set: 65_536 },
    Limit {
        check: "neighbour table IPv6",
        file: "net/ipv6/neigh/default/gc_thresh3",
        least: 4096,
        set: 65_536,
    },
];

impl Limit {
    fn look(&self, root: &Path) -> Finding {
        let text = fs::read_to_string(root.join("proc/sys").join(self.file));
        let value = text.ok().and_then(|t| t.trim().parse::<u64>().ok());
        match value {
            Some(value) if value >= self.least => finding(self.check, OK, value.to_string(), None),
            Some(value) => {
                let found = format!("{value}: too few for a thousand VMs");
                let fix = format!("sysctl -w {}={}", self.file.replace('/', "."), self.set);
                finding(self.check, WARNING, found, Some(&fix))
            }
            None => finding(self.check, WARNING, format!("/proc/sys/{} cannot be read", self.file), None),
        }
    }

    fn raise(&self, root: &Path) -> io::Result<()> {
        fs::write(root.join("proc/sys").join(self.file), self.set.to_string())
    }
}

/// Raises the limits that are too low (until the next boot) and looks again.
fn fix(root: &Path, findings: &mut [Finding]) {
    for limit in &LIMITS {
        let Some(found) = findings.iter_mut().find(|f| f.check == limit.check && f.state != OK) else {
            continue;
        };
        match limit.raise(root) {
            Ok(()) => {
                *found = limit.look(root);
                found.found.push_str(" (set now; put it into /etc/sysctl.d to keep it)");
            }
            Err(error) => found.found.push_str(&format!("; it cannot be set: {error}")),
        }
    }
}

/// Adds findings; of two about the same thing the worse one stays.
fn merge(findings: &mut Vec<Finding>, more: Vec<Finding>) {
    let weight = |f: &Finding| match f.state.as_str() {
        OK => 0,
        WARNING => 1,
        _ => 2,
    };
    for new in more {
        match findings.iter_mut().find(|f| f.check == new.check) {
            Some(old) if weight(&new) > weight(old) => *old = new,
            Some(_) => {}
            None => findings.push(new),
        }
    }
}

/// What the VMM found when it tried guests (its `probe --json`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", tag = "guests")]
enum Probe {
    NoKvm { reason: String },
    SmallGuestsOnly { reason: String },
    LinuxGuests,
}

/// What the agent finds when it looks itself.
async fn agent(folder: Option<&Path>) -> Vec<Finding> {
    match answer(folder, "blixard-agent", &["--cgroup", CGROUP, "doctor", "--json"]).await {
        Ok(findings) => findings,
        Err(finding) => vec![finding],
    }
}

/// Which guests run here, tried by the VMM.
async fn probe(folder: Option<&Path>) -> Vec<Finding> {
    let check = "guests";
    let fix = "use a machine with VT-x or AMD-V, or one with nested virtualisation";
    vec![match answer(folder, "blixard-vmm", &["probe", "--json"]).await {
        Ok(Probe::LinuxGuests) => finding(check, OK, "Linux guests run (tried)", None),
        Ok(Probe::SmallGuestsOnly { reason }) => {
            finding(check, BAD, format!("/dev/kvm runs no Linux: {reason}"), Some(fix))
        }
        Ok(Probe::NoKvm { reason }) => {
            let denied = OpenOptions::new().read(true).write(true).open("/dev/kvm");
            match denied {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let found = "not tried: this user may not open /dev/kvm";
                    finding(check, WARNING, found, Some("sudo blixard doctor"))
                }
                _ => finding(check, BAD, reason, Some(fix)),
            }
        }
        Err(finding) => finding,
    }]
}

/// What another program of Blixard answers; a finding when it does not.
async fn answer<T: DeserializeOwned>(
    folder: Option<&Path>,
    name: &str,
    arguments: &[&str],
) -> Result<T, Finding> {
    let check = name.to_owned();
    let path = programs::find(folder, name).map_err(|_| {
        let fix = "put it beside blixard, or name its folder with --bin-dir";
        finding(&check, WARNING, format!("the program {name} is not found"), Some(fix))
    })?;
    let output = tokio::process::Command::new(&path)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(CHECK_TIME, output)
        .await
        .map_err(|_| finding(&check, BAD, "it did not end in time", None))?
        .map_err(|error| finding(&check, BAD, format!("it cannot be started: {error}"), None))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let said: String = String::from_utf8_lossy(&output.stderr).chars().take(200).collect();
        let found = format!("its answer is not what this program reads ({}) {said}", output.status);
        finding(&check, BAD, found, Some("are all programs of the same version? see `blixard version`"))
    })
}

/// What a running node reports.
async fn node(context: &Context) -> Vec<Finding> {
    let host = context.client.host();
    match context.client.doctor().await {
        Ok(mut findings) => {
            findings.push(finding("node", OK, format!("answers at {host}"), None));
            findings
        }
        Err(error @ ClientError::Connect { .. }) => {
            vec![finding("node", WARNING, error.to_string(), error.suggestion().as_deref())]
        }
        Err(error) => vec![finding("node", BAD, error.to_string(), error.suggestion().as_deref())],
    }
}

fn show(context: &Context, findings: &[Finding]) -> Result<(), CliError> {
    if context.output.structured() {
        return context.output.value(&findings);
    }
    let mut table = Table::new(&["CHECK", "STATE", "FOUND"]);
    for f in findings {
        table.row(vec![f.check.clone(), f.state.clone(), f.found.clone()]);
    }
    context.output.text(&table.render())?;
    let fixes: Vec<String> = findings
        .iter()
        .filter(|f| f.state != OK)
        .filter_map(|f| f.fix.as_ref().map(|fix| format!("  {}: {}\n", printable(&f.check), printable(fix))))
        .collect();
    if !fixes.is_empty() {
        context.output.text(&format!("\nWhat to do:\n{}", fixes.concat()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn of<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
        findings.iter().find(|f| f.check == check).unwrap()
    }

    #[test]
    fn a_bare_host_hears_what_is_missing_and_how_to_get_it() {
        let root = host(&[("proc/cpuinfo", "flags : fpu svm\n"), ("proc/sys/kernel/osrelease", "6.1.0\n")]);
        let findings = own(root.path());
        assert_eq!(
            (of(&findings, "/dev/kvm").state.as_str(), of(&findings, "/dev/kvm").fix.as_deref()),
            (BAD, Some("modprobe kvm_amd"))
        );
        assert_eq!(of(&findings, "/dev/net/tun").state, BAD);
        assert_eq!(of(&findings, "cgroup v2").state, WARNING);
        assert!(
            findings.iter().all(|f| f.state == OK || f.fix.is_some() || f.found.contains("cannot be read"))
        );
    }

    #[test]
    fn a_good_host_has_nothing_to_do() {
        let mut files = vec![
            ("dev/kvm", ""),
            ("dev/mapper/control", ""),
            ("dev/net/tun", ""),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
            ("proc/sys/kernel/osrelease", "6.1.0\n"),
            ("boot/vmlinuz-6.1.0", ""),
            ("lib/modules/6.1.0/modules.dep", ""),
        ];
        let limits: Vec<String> = LIMITS.iter().map(|l| format!("proc/sys/{}", l.file)).collect();
        files.extend(limits.iter().map(|l| (l.as_str(), "4194304\n")));
        let findings = own(host(&files).path());
        assert!(findings.iter().all(|f| f.state == OK), "{findings:?}");
    }

    #[test]
    fn fix_raises_a_low_limit_and_says_how_to_keep_it() {
        let root = host(&[("proc/sys/kernel/pid_max", "32768\n")]);
        let mut findings = own(root.path());
        assert_eq!(of(&findings, "pid_max").fix.as_deref(), Some("sysctl -w kernel.pid_max=4194304"));
        fix(root.path(), &mut findings);
        assert_eq!(of(&findings, "pid_max").state, OK);
        assert_eq!(fs::read_to_string(root.path().join("proc/sys/kernel/pid_max")).unwrap(), "4194304");
    }

    #[test]
    fn of_two_findings_about_the_same_thing_the_worse_one_is_shown() {
        let mut findings = vec![finding("kvm", OK, "can be opened", None)];
        merge(&mut findings, vec![finding("kvm", BAD, "cannot run", None), finding("new", OK, "", None)]);
        merge(&mut findings, vec![finding("kvm", OK, "can be opened", None)]);
        assert_eq!((findings.len(), of(&findings, "kvm").state.as_str()), (2, BAD));
    }
}
