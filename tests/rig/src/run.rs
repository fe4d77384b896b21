//! One run: hosts from a snapshot, their names and addresses, the command, its exit code.

use crate::accel::{self, Accel};
use crate::cache::Cache;
use crate::leash::{self, Leash};
use crate::qemu::{self, Host, Origin, Plan, Shape, Share};
use crate::say::say;
use crate::ssh::{self, Address, Shell};
use crate::work::{self, WorkFolder};
use crate::{image, shell, snapshot, switch};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Exit code of `ssh` when it has lost its connection.
const LOST: u8 = 255;
/// Exit code when a processor of a host hangs: what was tried there has neither failed nor passed.
pub const HUNG: u8 = 123;

/// What can go wrong before the command runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No image.
    #[error("no host image")]
    Image(#[from] image::Error),
    /// No accelerator.
    #[error("cannot choose an accelerator")]
    Accel(#[from] accel::Error),
    /// No snapshot.
    #[error("no snapshot")]
    Snapshot(#[from] snapshot::Error),
    /// No network.
    #[error("no private segment")]
    Switch(#[from] switch::Error),
    /// A host did not start.
    #[error("cannot start the hosts")]
    Host(#[from] qemu::Error),
    /// A host could not be prepared.
    #[error("cannot prepare the hosts")]
    Control(#[from] ssh::Error),
    /// A process could not be run, or everything was stopped.
    #[error("cannot run the command")]
    Run(#[from] leash::Error),
    /// No folder for the files of this run.
    #[error("cannot start a run")]
    Folder(#[from] work::Error),
    /// A file of this run could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The file or folder.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The machine has no source of random bytes.
    #[error("cannot read random bytes")]
    Random(#[source] io::Error),
}

/// What to run and on what.
pub struct Options {
    /// Number of hosts.
    pub hosts: u8,
    /// Processors and memory of each.
    pub shape: Shape,
    /// Folders that all hosts see.
    pub shares: Vec<Share>,
    /// Time limit, from the start of the hosts.
    pub timeout: Duration,
    /// Boots instead of restoring.
    pub boot: bool,
    /// Where to leave the consoles.
    pub logs: Option<PathBuf>,
    /// Gives the command a terminal.
    pub tty: bool,
    /// The command.
    pub command: Vec<String>,
}

/// Runs the command and answers with its exit code.
pub fn run(options: &Options, cache: &Cache, leash: &Leash) -> Result<u8, Error> {
    let accel = Accel::choose(leash)?;
    let image = image::ensure(cache, leash)?;
    let Options { shape, shares, .. } = options;
    let plan = Plan { accel: &accel, shape, image: image.path(), shares, switch: None };
    let snapshot = match options.boot {
        true => None,
        false => Some(snapshot::ensure(cache, &image, &plan, leash)?),
    };
    leash.limit(options.timeout)?;

    let folder = WorkFolder::new()?;
    let switch = folder.path().join("switch");
    let places: Vec<_> = (0..options.hosts).map(|index| folder.path().join(format!("rig{index}"))).collect();
    if options.hosts > 1 {
        switch::start(&switch, places.iter().map(|place| qemu::port(place)).collect())?;
    }
    let plan = Plan { switch: (options.hosts > 1).then_some(switch.as_path()), ..plan };
    let rams: Vec<_> = places.iter().map(|place| place.join("ram")).collect();
    let origins: Vec<_> = rams
        .iter()
        .map(|ram| snapshot.as_ref().map_or(Origin::Boot(ram), |entry| Origin::Snapshot(entry.path())))
        .collect();

    // Each stage for all hosts before the next: they start, connect and prepare at the same time.
    let mut hosts = Vec::new();
    for ((index, place), origin) in (0..options.hosts).zip(&places).zip(&origins) {
        hosts.push(plan.start(index, place, origin, leash)?);
    }
    let result = prepare(options, &accel, &mut hosts, &origins, image.path(), leash).and_then(|channels| {
        // Everything of the cache is open: others may make a snapshot of another shape now.
        drop((snapshot, image));
        command(options, &channels, leash)
    });
    let limit = leash.check().is_err_and(|error| matches!(error, leash::Error::Stopped(leash::Stop::Limit)));
    let lost = matches!(result, Ok(LOST));
    let mut hung = false;
    if limit || lost {
        let why = if limit {
            "the time limit has passed"
        } else {
            "the connection was lost, or the exit code is 255"
        };
        for host in &mut hosts {
            let found = host.autopsy();
            hung |= found.hung;
            say(format!("{why}; {}: {}", host.name(), found.text));
        }
    }
    if let Some(logs) = &options.logs {
        keep_logs(logs, &hosts)?;
    }
    if hung { Ok(HUNG) } else { result }
}

/// Restores the hosts and gives each what must differ: clock, names, addresses, random numbers, mounts.
fn prepare(
    options: &Options,
    accel: &Accel,
    hosts: &mut [Host],
    origins: &[Origin<'_>],
    image: &Path,
    leash: &Leash,
) -> Result<Vec<(Address, Shell)>, Error> {
    for (host, origin) in hosts.iter_mut().zip(origins) {
        host.resume(origin)?;
    }
    let mut channels = Vec::new();
    for host in hosts.iter_mut() {
        let address = Address::of(host, image)?;
        let shell = Shell::open(host, &address, leash)?;
        channels.push((address, shell));
    }
    if options.boot {
        for ((_, shell), host) in channels.iter_mut().zip(hosts.iter()) {
            shell.run(host, snapshot::SETTLE)?;
            if accel.emulated {
                shell.run(host, snapshot::HOLD)?;
            }
        }
    }
    for ((_, shell), host) in channels.iter_mut().zip(hosts.iter()) {
        shell.begin(host, &setup_script(host.index, &options.shares, &random()?, now()))?;
    }
    for ((_, shell), host) in channels.iter_mut().zip(hosts.iter()) {
        shell.end(host)?;
    }
    Ok(channels)
}

fn setup_script(index: u8, shares: &[Share], random: &[u8; 32], now: Duration) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (machine, seed) = random.split_at(16);
    let number = index.saturating_add(1);
    let mut script = format!(
        "date -s @{}.{:03} >/dev/null
        echo {} >/dev/urandom
        hostname rig{index}; echo rig{index} >/etc/hostname; echo {} >/etc/machine-id
        echo 52:54:00:77:00:{number:02x} 10.77.0.{number}/24 >/etc/rig/segment; rig-network segment\n",
        now.as_secs(),
        now.subsec_millis(),
        hex(seed),
        hex(machine),
    );
    for (slot, share) in shares.iter().enumerate() {
        let (target, field) = (shell::quote(&share.target), shell::fstab(&share.target));
        // In fstab, so that a host that reboots has them again.
        let line =
            format!("share{slot} {field} 9p trans=virtio,version=9p2000.L,msize=512000,cache=mmap 0 0");
        script.push_str(&format!("echo {} >>/etc/fstab\n", shell::quote(&line)));
        script.push_str(&format!("mkdir -p {target}; mount {target}\n"));
    }
    script
}

/// The command, in host 0, with our standard streams.
fn command(options: &Options, channels: &[(Address, Shell)], leash: &Leash) -> Result<u8, Error> {
    let Some((address, _)) = channels.first() else { return Ok(0) };
    let hosts: Vec<_> = (1..=options.hosts).map(|number| format!("10.77.0.{number}")).collect();
    let folder = options.shares.first().map_or("/root", |share| share.target.as_str());
    let script = format!(
        "export RIG_HOSTS={}; cd {}; {}",
        shell::quote(&hosts.join(" ")),
        shell::quote(folder),
        shell::command(&options.command)
    );
    let mut session = leash.start(&mut address.session(options.tty, &script))?;
    Ok(exit_code(session.wait()?))
}

fn exit_code(status: ExitStatus) -> u8 {
    let signal = || status.signal().map(|number| number.saturating_add(128));
    status.code().or_else(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(255)
}

fn keep_logs(logs: &Path, hosts: &[Host]) -> Result<(), Error> {
    let write = |source| Error::Write { path: logs.display().to_string(), source };
    fs::create_dir_all(logs).map_err(write)?;
    for host in hosts {
        for name in ["console", "qemu.log"] {
            let to = logs.join(format!("{}.{name}", host.name()));
            fs::copy(host.folder().join(name), to).map_err(write)?;
        }
    }
    Ok(())
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn random() -> Result<[u8; 32], Error> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(Error::Random)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_of_a_command_is_kept() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn hosts_differ_in_name_address_and_identity() {
        let script = |index, byte| setup_script(index, &[], &[byte; 32], Duration::from_millis(1500));
        let (first, second) = (script(0, 1), script(1, 2));
        assert!(first.contains("date -s @1.500") && first.contains("hostname rig0;"));
        assert!(first.contains("52:54:00:77:00:01 10.77.0.1/24"));
        assert!(second.contains("52:54:00:77:00:02 10.77.0.2/24"));
        assert!(second.contains(&format!("echo {} >/etc/machine-id", "02".repeat(16))));
    }
}
