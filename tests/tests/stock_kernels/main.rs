//! Stock kernels with all devices at once, under load, through snapshot, restore and fork; then whether disks and memory
//! have what was written to them.
//!
//! Needs root, a `/dev/kvm` that runs Linux, fio, iperf3: `make test-rig` (the cloud kernel) and `make test-kernels` (all) provide
//! that in the rig, and set `BLIXARD_STOCK_KERNELS` to the names of the kernels.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::print_stdout)]

mod guest;
mod host;
mod kernel;
mod vm;

use std::path::Path;

use blixard_vmm_api::control::Request;
use libtest_mimic::{Arguments, Failed, Trial};

use guest::{Disks, MEMORY_MIB};
use host::{Net, run};
use kernel::Kernel;
use vm::Vm;

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let kernels = std::env::var("BLIXARD_STOCK_KERNELS").unwrap_or_default();
    if kernels.is_empty() && !arguments.list {
        println!("skipped: stock kernels: run in the rig (make test-kernels)");
        return std::process::ExitCode::SUCCESS;
    }
    let trials = kernels.split_whitespace().map(str::to_owned).map(|kernel| {
        let name = format!("a_{kernel}_kernel_under_load_loses_nothing_through_snapshot_restore_and_fork");
        Trial::test(name, move || {
            std::panic::catch_unwind(|| loses_nothing(&kernel)).map_err(|e| {
                let text = e.downcast_ref::<String>().cloned();
                Failed::from(
                    text.or_else(|| e.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default(),
                )
            })
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Says how far it is, with the time that `what` took.
fn step<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let begun = std::time::Instant::now();
    let done = act();
    println!("  {what}: {:.1} s", begun.elapsed().as_secs_f32());
    done
}

fn vmm(words: &[&str]) -> String {
    run(&format!("{}/blixard-vmm", host::PROGRAMS), words)
}

fn loses_nothing(kernel: &str) {
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    let folder = scratch.path();
    let kernel = step("kernel", || Kernel::prepare(kernel, folder));
    let root = step("root", || guest::root(&kernel, folder));
    let disks = Disks::new(folder, "parent");
    let net = Net::new("parent");
    let start = |net: &Net, name: &str, words: &[&str], disks: &Disks, suffix: &str| {
        let devices = guest::devices(folder, name, &root, disks);
        let words: Vec<&str> = words.iter().copied().chain(devices.iter().map(String::as_str)).collect();
        Vm::start(net, folder, name, &words, suffix)
    };
    let (memory, image) = (MEMORY_MIB.to_string(), kernel.kernel.to_str().unwrap());
    let mut boot =
        vec!["run", "--kernel", image, "--initramfs", kernel.initramfs.to_str().unwrap(), "--vcpus", "2"];
    boot.extend([
        "--memory",
        &memory,
        "--track-writes",
        "--cmdline",
        "console=ttyS0 reboot=a panic=-1 quiet",
    ]);
    let parent = start(&net, "parent", &boot, &disks, "");
    step("boot", || parent.ready());
    assert_eq!(
        parent.exec("uname -r; nproc").split_whitespace().collect::<Vec<_>>(),
        [kernel.release.as_str(), "2"]
    );
    step("set up", || guest::set_up(&parent));
    // It is there for all of what follows.
    let mut stream = parent.begin("cat");
    let mut echo = |text: &str| {
        stream.write(text.as_bytes());
        assert_eq!(stream.read(text.len()), text.as_bytes());
    };
    echo("before");
    step("load", || guest::works(&parent));
    parent.ask(&Request::SetBalloon { mib: 64 });

    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let files =
        |name: &str| format!("{},{}", file(&format!("{name}.state")), file(&format!("{name}.memory")));
    // Between Pause and Resume everything is of one instant: memory, and the disks, which nobody writes.
    let snapshot = |name: &str, kind: &[&str]| {
        parent.ask(&Request::Pause);
        let copies = disks.copy(folder, name);
        let (state, memory) = (file(&format!("{name}.state")), file(&format!("{name}.memory")));
        println!("  {}", vmm(&[&["snapshot", parent.control(), &state, &memory], kind].concat()).trim());
        parent.ask(&Request::Resume);
        copies
    };
    let full = step("full snapshot", || snapshot("full", &[]));
    echo("behind a snapshot");
    step("load", || guest::works(&parent));
    let diff = step("diff snapshot", || snapshot("diff", &["--diff"]));
    step("load", || guest::works(&parent));

    let nets = ["left", "right"].map(Net::new);
    let done = guest::rounds(&parent);
    let children = step("fork", || {
        parent.ask(&Request::Pause);
        let children: Vec<Vm> = ["left", "right"]
            .iter()
            .zip(&nets)
            .map(|(name, net)| {
                let copies = disks.copy(folder, name);
                start(net, name, &["fork", parent.control(), "1"], &copies, ".0")
            })
            .collect();
        // Their memory is frozen as soon as they answer.
        children.iter().for_each(Vm::ready);
        parent.ask(&Request::Resume);
        children
    });
    echo("behind a fork");
    let before = parent.stats();
    step("load", || guest::works(&parent));
    let after = parent.stats();
    for count in ["net.nic0.sent_bytes", "net.nic0.received_bytes"] {
        let tells = || parent.exec("cat /dev/shm/iperf.log; ping -c 3 10.9.0.1 || true");
        assert!(after[count] > before[count], "{count} does not grow: {}\n{}", after[count], tells());
    }
    assert!(after["balloon.actual_bytes"] >= 64 << 20, "the balloon of the parent");
    // What is not looked at rests: it would only take time from the others.
    let rest = |vm: &Vm, request: Request| drop(vm.ask(&request));
    rest(&parent, Request::Pause);
    children.iter().for_each(|child| rest(child, Request::Pause));
    for (name, child) in ["left", "right"].iter().zip(&children) {
        rest(child, Request::Resume);
        step("load of a child", || guest::works(child));
        assert!(guest::rounds(child) > done, "its load goes on from where it was");
        assert_eq!(child.exec("hostname").trim(), *name);
        step("check of a child", || guest::is_whole(child));
    }
    rest(&parent, Request::Resume);
    let random = |vm: &Vm| vm.exec("head -c 16 /dev/urandom | sha256sum");
    assert_ne!(random(&children[0]), random(&children[1]), "children draw other random numbers");
    drop((children, nets));
    step("check of the parent", || guest::is_whole(&parent));
    echo("in the end");
    stream.end();
    ends_well(parent, &disks);
    drop(net);

    let (full_files, diff_files) = (files("full"), files("diff"));
    for (name, disks, words) in [
        ("restored-diff", &diff, vec!["run", "--restore", &diff_files, "--base", &full_files]),
        ("restored-full", &full, vec!["run", "--restore", &full_files, "--userfault"]),
    ] {
        let net = Net::new(name);
        let vm = start(&net, name, &words, disks, "");
        step("restore", || vm.ready());
        let done = guest::rounds(&vm);
        step("load of a restored VM", || guest::works(&vm));
        assert!(guest::rounds(&vm) > done);
        assert_eq!(vm.exec("hostname").trim(), name);
        let (guest, host) = (vm.exec("date +%s"), run("date", &["+%s"]));
        let [guest, host] = [guest, host].map(|text| text.trim().parse::<i64>().unwrap());
        assert!((guest - host).abs() < 10, "the clock of the guest: {guest}, that of the host: {host}");
        step("check of a restored VM", || guest::is_whole(&vm));
        ends_well(vm, disks);
    }
}

/// Ends a VM in good order; then its volume, seen from the host, is a clean file system that has the known content.
fn ends_well(vm: Vm, disks: &Disks) {
    vm.ask(&Request::Stop);
    let said = vm.said();
    assert_eq!(vm.ends(), 0, "{said}");
    has_known_content(&disks.0[0], "/upper/root/known");
    has_known_content(&disks.0[2], "/known");
}

fn has_known_content(disk: &Path, path: &str) {
    let disk = disk.to_str().unwrap();
    run("e2fsck", &["-fn", disk]);
    let found = format!("{disk}.known");
    run("debugfs", &["-R", &format!("dump {path} {found}"), disk]);
    assert!(std::fs::read(&found).unwrap() == guest::written(), "{disk} has {path} as it was written");
}
