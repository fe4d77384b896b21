//! Hosts that have already booted: memory in a file, device state, and the root disk frozen at that moment.
//! One snapshot serves any number of hosts and runs; each uses it copy-on-write.

use crate::cache::{self, Cache, Entry, Kind};
use crate::leash::{self, Leash};
use crate::qemu::{self, Origin, Plan};
use crate::say::say;
use crate::ssh::{self, Address, Shell};
use crate::{programs, recipe};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Raised when the making of snapshots changes in a way its other ingredients do not show.
const VERSION: &str = "3";
/// A boot takes half a minute under emulation; a loaded machine may need many times that.
const BOOT_LIMIT: Duration = Duration::from_secs(900);

/// Waits for the end of the boot, loads once what every run uses, so that it is in the page cache of the snapshot,
/// and leaves nothing dirty. On a loaded machine udev is still loading kvm when systemd says it is running.
pub const SETTLE: &str = "systemctl is-system-running --wait
    udevadm settle --timeout=120
    [ -c /dev/kvm ] || { echo no /dev/kvm; exit 1; }
    tr -d - </proc/sys/kernel/random/uuid >/dev/null; ip -br addr >/dev/null; hostname >/dev/null
    mount -t tmpfs none /mnt; umount /mnt; sync";
/// What an emulated host keeps in use for as long as it runs.
pub const HOLD: &str = include_str!("hold.sh");
/// Says on the console, which we can read, that no ssh session is left.
const WATCH: &str = "setsid sh -c 'while pgrep -f \"^sshd: root\" >/dev/null; do sleep 0.1; done
    sync; echo rig-is-idle >/dev/ttyS0' >/dev/null 2>&1 &";
const IDLE: &[u8] = b"rig-is-idle";

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache failed.
    #[error("cannot use the cache")]
    Cache(#[from] cache::Error),
    /// The host failed.
    #[error("the first boot failed")]
    Boot(#[from] qemu::Error),
    /// The host could not be controlled.
    #[error("the first boot failed")]
    Control(#[from] ssh::Error),
    /// A signal or the time limit of the first boot came.
    #[error("the first boot was stopped")]
    Stopped(#[from] leash::Error),
    /// A file could not be put in its place.
    #[error("cannot keep the files of the snapshot")]
    Keep(#[source] io::Error),
}

/// The snapshot for this plan; a host is booted once when there is none.
pub fn ensure(cache: &Cache, image: &Entry, plan: &Plan<'_>, leash: &Leash) -> Result<Entry, Error> {
    let parts = [
        VERSION,
        HOLD,
        &recipe::image_key(),
        &programs::qemu_version(),
        &plan.accel.name,
        &plan.fingerprint(),
    ];
    cache.ensure(Kind::Snapshot, &recipe::key(&parts), leash, |new| make(new, image, plan, leash))
}

fn make(new: &Path, image: &Entry, plan: &Plan<'_>, leash: &Leash) -> Result<(), Error> {
    let qemu::Shape { cpus, mem } = plan.shape;
    say(format_args!("first run with {cpus} processors and {mem} MiB: booting a host to take a snapshot of"));
    let start = Instant::now();
    leash.limit(BOOT_LIMIT)?;
    let plan = Plan { shares: &[], switch: None, ..*plan };
    let folder = new.join("host");
    let ram = new.join("ram");
    let origin = Origin::Boot(&ram);
    let mut host = plan.start(0, &folder, &origin, leash)?;
    host.resume(&origin)?;
    let address = Address::of(&mut host, image.path())?;
    let mut shell = Shell::open(&mut host, &address, leash)?;
    shell.run(&host, SETTLE)?;
    if plan.accel.emulated {
        shell.run(&host, HOLD)?;
    }
    shell.run(&host, WATCH)?;
    shell.close()?;
    // The console is a file that QEMU appends to: there is no event to wait for.
    while !fs::read(folder.join("console")).is_ok_and(|text| text.windows(IDLE.len()).any(|w| w == IDLE)) {
        leash.check()?;
        if host.ended() {
            return Err(ssh::Error::HostEnded(host.last_words()).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    host.save(&new.join("state"))?;
    drop(host);
    fs::rename(folder.join("root"), new.join("root")).map_err(Error::Keep)?;
    fs::remove_dir_all(&folder).map_err(Error::Keep)?;
    leash.limit(Duration::ZERO)?;
    say(format_args!("snapshot taken in {:.0} s", start.elapsed().as_secs_f32()));
    Ok(())
}
