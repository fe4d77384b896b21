//! Which accelerator runs the hosts: KVM when this machine lends its virtualization extensions to guests,
//! else QEMU's translator (TCG) with an emulated AMD SVM. KVM is tried, not guessed.

use crate::leash::{self, Leash};
use crate::programs;
use crate::qmp::{self, Qmp};
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// `la57=off`: short page walks. `-erms,-fsrm`: copy loops that TCG runs 8 bytes at a time, not one.
const TCG: [&str; 4] = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,+svm,la57=off,-erms,-fsrm"];
const KVM: [&str; 4] = ["-accel", "kvm", "-cpu", "host"];
/// The firmware prints within milliseconds where KVM works.
const TRY_TIME: Duration = Duration::from_secs(5);

/// What can go wrong when KVM is tried or asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The variable has an unknown value.
    #[error("BLIXARD_RIG_ACCEL is {0:?}; it can be kvm or tcg")]
    Wanted(String),
    /// KVM was asked for by name and does not work.
    #[error("BLIXARD_RIG_ACCEL asks for kvm: {0}")]
    Unusable(String),
}

/// A choice, with its reason.
#[derive(Debug, Clone)]
pub struct Accel {
    /// QEMU arguments.
    pub args: [&'static str; 4],
    /// What distinguishes snapshots: state of `-cpu host` only fits the same processor.
    pub name: String,
    /// Why this one.
    pub why: String,
    /// Processors are TCG's, so that hosts keep away from two of its races (`README.md`, "Gotchas"): their first processor runs
    /// nothing that it is not forced to, and they keep a VM open ([`crate::snapshot::HOLD`]).
    ///
    /// The first race, in QEMU 7.2 (10.0 shows the same panic): TCG's XRSTOR on any processor clears a flag of the first one
    /// (`cpu_clear_ignne`) with a read, a change and a write that are not atomic. When the first processor leaves a guest at the
    /// same moment, it can stay half inside: nested paging goes on for the host. Then the guest ends in a triple fault, or the
    /// host panics. A first processor that never enters a guest cannot lose its flags.
    pub emulated: bool,
}

impl Accel {
    /// Chooses; `$BLIXARD_RIG_ACCEL` (kvm or tcg) overrides.
    pub fn choose(leash: &Leash) -> Result<Self, Error> {
        let tcg = |why: String| Self { args: TCG, name: "tcg".into(), why, emulated: true };
        let wanted = std::env::var("BLIXARD_RIG_ACCEL").unwrap_or_default();
        match wanted.as_str() {
            "tcg" => return Ok(tcg("BLIXARD_RIG_ACCEL asks for it".into())),
            "" | "kvm" => {}
            _ => return Err(Error::Wanted(wanted)),
        }
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        match lends(&cpuinfo, Path::new("/sys/module")).and_then(|()| try_kvm(leash)) {
            Ok(()) => {
                let model = cpuinfo.lines().find(|l| l.starts_with("model name")).unwrap_or_default();
                let (name, why) = (format!("kvm {model}"), "a trial run of it worked".into());
                Ok(Self { args: KVM, name, why, emulated: false })
            }
            Err(why) if wanted == "kvm" => Err(Error::Unusable(why)),
            Err(why) => Ok(tcg(format!("no KVM: {why}"))),
        }
    }
}

/// Cheap reasons against KVM.
fn lends(cpuinfo: &str, modules: &Path) -> Result<(), String> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let module = match flags.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")) {
        Some("vmx") => "kvm_intel",
        Some(_) => "kvm_amd",
        None => return Err("the processor shows neither vmx nor svm".into()),
    };
    let nested = fs::read_to_string(modules.join(module).join("parameters/nested")).unwrap_or_default();
    if !matches!(nested.trim(), "1" | "Y") {
        return Err(format!("module {module} is not loaded with nested=1"));
    }
    let device = fs::File::options().read(true).write(true).open("/dev/kvm");
    device.map(drop).map_err(|error| format!("/dev/kvm: {error}"))
}

/// Starts a machine with nothing but its firmware: it must execute, and have the extensions itself.
fn try_kvm(leash: &Leash) -> Result<(), String> {
    trial(leash).map_err(|error| crate::say::chain(&error))
}

#[derive(Debug, thiserror::Error)]
enum Trial {
    #[error("cannot prepare a trial of KVM")]
    Prepare(#[source] io::Error),
    #[error("a trial of KVM did not start")]
    Start(#[source] leash::Error),
    #[error("a trial of KVM ended early")]
    Talk(#[source] qmp::Error),
    #[error("guests do not get vmx or svm")]
    NotNested,
    #[error("the firmware of a trial machine did not run")]
    Dead,
}

fn trial(leash: &Leash) -> Result<(), Trial> {
    let folder = tempfile::tempdir().map_err(Trial::Prepare)?;
    let log = folder.path().join("firmware");
    let (ours, theirs) = UnixStream::pair().map_err(Trial::Prepare)?;
    let mut command = programs::command("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-m", "64M"]);
    command.args(KVM).arg("-debugcon").arg(format!("file:{}", log.display()));
    command.args(["-global", "isa-debugcon.iobase=0x402"]);
    command.args(["-chardev", "socket,id=qmp,fd=0", "-mon", "chardev=qmp,mode=control"]);
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let _machine = leash.start(&mut command).map_err(Trial::Start)?;
    drop(command); // with it our copy of QEMU's end: when QEMU ends, the socket shows it
    let mut qmp = Qmp::connect(ours).map_err(Trial::Talk)?;
    qmp.patience(Some(TRY_TIME)).map_err(Trial::Talk)?;
    let model = qmp
        .ask("query-cpu-model-expansion", json!({ "type": "full", "model": { "name": "host" } }))
        .map_err(Trial::Talk)?;
    let has = |flag: &str| model.pointer(&format!("/model/props/{flag}")) == Some(&Value::Bool(true));
    if !has("vmx") && !has("svm") {
        return Err(Trial::NotNested);
    }
    let end = Instant::now() + TRY_TIME;
    while Instant::now() < end {
        if fs::metadata(&log).is_ok_and(|file| file.len() > 0) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(Trial::Dead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_extensions_is_refused_with_the_reason() {
        let why = lends("flags\t\t: fpu sse2\n", Path::new("/nowhere")).unwrap_err();
        assert_eq!(why, "the processor shows neither vmx nor svm");
    }

    #[test]
    fn extensions_that_are_not_lent_on_are_refused() {
        let modules = tempfile::tempdir().unwrap();
        let folder = modules.path().join("kvm_intel/parameters");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("nested"), "N\n").unwrap();
        let why = lends("flags\t\t: fpu vmx\n", modules.path()).unwrap_err();
        assert_eq!(why, "module kvm_intel is not loaded with nested=1");
    }
}
