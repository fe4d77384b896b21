//! Whole VMs with hand-made guests on this machine's `/dev/kvm`, with seccomp filters on. They need no more of KVM than
//! software flavours offer; without KVM they are skipped with one line.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "tests"
)]

mod code;
mod devices;
mod large;
mod processor;
mod snapshot;
mod vm;

use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use blixard_vmm_api::config::{ConsoleConfig, VmConfig};
use blixard_vmm_api::control::{Event, FromVmm, Phase, Reply, Request};
use blixard_vmm_api::exit::ExitRecord;
use blixard_vmm_api::rate::RateLimit;
use blixard_vmm_api::snapshot::MemoryConfig;
use blixard_vmm_api::{ExitReason, VmId};

use vm::{Ended, Vm, possible};

fn ended(code: i32, output: &str) -> Ended {
    Ended { code: Some(code), output: output.into(), problems: String::new() }
}

#[test]
fn a_guest_prints_its_command_line_and_powers_off() {
    if possible() {
        let vm = Vm::run(code::prints_its_command_line(), &["--cmdline", "hello from 64 bits"]);
        assert_eq!(vm.end(), ended(0, "hello from 64 bits"));
    }
}

#[test]
fn a_slow_reader_of_standard_output_gets_the_last_words_too() {
    if !possible() {
        return;
    }
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: no pointers are involved.
    let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    writer.write_all(&vec![b'x'; usize::try_from(size).unwrap()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, code::prints_its_command_line().elf()).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
    command.args(["run", "--no-stdin", "--cmdline", "last words", "--kernel"]).arg(kernel).stdout(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    // Its loop waits in epoll_wait; in poll(2) it waits for the reader, after the guest has ended.
    let waiting = format!("{} ", libc::SYS_poll);
    let place = format!("/proc/{}/syscall", child.id());
    while !std::fs::read_to_string(&place).is_ok_and(|call| call.starts_with(&waiting)) {
        assert!(child.try_wait().unwrap().is_none(), "ended before its output was read");
        std::thread::yield_now();
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text.trim_start_matches('x'), "last words");
}

#[test]
fn a_guest_is_entered_by_pvh() {
    if possible() {
        assert_eq!(Vm::run(code::entered_by_pvh(), &[]).end(), ended(0, "P"));
    }
}

#[test]
fn a_reset_has_its_own_exit_code() {
    if possible() {
        assert_eq!(Vm::run(code::resets_by_chipset(), &[]).end(), ended(6, ""));
        assert_eq!(Vm::run(code::resets_by_keyboard(), &[]).end(), ended(6, ""));
    }
}

#[test]
fn a_triple_fault_is_told_as_a_fault_of_the_guest() {
    if possible() {
        let end = Vm::run(code::triple_faults(), &[]).end();
        assert_eq!(end.code, Some(5));
        assert!(
            end.problems.contains("the guest stopped with a fault: vCPU 0: triple fault"),
            "{}",
            end.problems
        );
    }
}

#[test]
fn the_boot_timer_is_there_only_when_asked_for() {
    if possible() {
        for timer in [true, false] {
            let option = if timer { "--boot-timer" } else { "--rng" };
            let vm = Vm::run(code::writes_the_boot_timer(), &["--control", "DIR/control", option]);
            vm.wait_for(b'T');
            let control = vm.control();
            let times = control.status().times;
            assert_eq!(times.boot_timer_us.is_some(), timer);
            assert!(
                times.process_start_us < times.vcpu_start_us && times.vcpu_start_us < times.first_serial_us
            );
            control.send(&serde_json::to_vec(&Request::Kill).unwrap());
            assert_eq!(vm.end().code, Some(7));
        }
    }
}

#[test]
fn processors_start_by_init_and_sipi() {
    if possible() {
        for others in [1usize, 7] {
            let (vcpus, text) = ((others + 1).to_string(), others.to_string());
            let end = Vm::run(code::starts_all_processors(), &["--vcpus", &vcpus, "--cmdline", &text]).end();
            let count = end.output.bytes().filter(|byte| *byte == b'p').count();
            assert_eq!((end.code, count, end.output.contains('B')), (Some(0), others, true), "{end:?}");
        }
    }
}

#[test]
fn a_guest_gets_random_bytes_with_an_interrupt() {
    if possible() {
        assert_eq!(Vm::run(code::drives_the_entropy_device(), &["--rng"]).end(), ended(0, "R"));
    }
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if possible() {
        let mut vm = Vm::run(code::echoes(), &[]);
        vm.wait_for(b'>');
        let text = "x".repeat(3000) + "q";
        vm.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
        assert_eq!(vm.end(), ended(0, &format!(">{text}")));
    }
}

#[test]
fn a_paused_guest_prints_nothing_until_it_goes_on() {
    if possible() {
        let vm = Vm::run(code::prints_for_ever(), &["--control", "DIR/control", "--vcpus", "2"]);
        vm.wait_for(b'.');
        let control = vm.control();
        assert_eq!(control.ask(&Request::Pause), Reply::Done);
        assert_eq!(control.ask(&Request::Pause), Reply::Done);
        assert_eq!(control.status().phase, Phase::Paused);
        // What was printed before the pause may still be on its way to the console.
        (0..20).for_each(|_| drop(control.status()));
        let before = control.printed();
        (0..200).for_each(|_| drop(control.status()));
        assert_eq!(control.printed(), before);
        assert_eq!(control.ask(&Request::Resume), Reply::Done);
        assert_eq!(control.status().phase, Phase::Running);
        while control.printed() <= before {}
        control.send(&serde_json::to_vec(&Request::Kill).unwrap());
        assert_eq!(vm.end().code, Some(7));
    }
}

#[test]
fn subscribers_hear_of_changes_and_of_the_end() {
    if possible() {
        let vm = Vm::run(code::prints_for_ever(), &["--control", "DIR/control"]);
        vm.wait_for(b'.');
        let (subscriber, other) = (vm.control(), vm.control());
        assert!(matches!(subscriber.ask(&Request::Subscribe), Reply::Status(_)));
        assert_eq!(other.ask(&Request::Pause), Reply::Done);
        let paused = |message: &FromVmm| match message {
            FromVmm::Event(Event::Changed(status)) => status.phase == Phase::Paused,
            _ => false,
        };
        while !paused(&subscriber.receive().unwrap()) {}
        other.send(&serde_json::to_vec(&Request::Kill).unwrap());
        let mut last = None;
        while let Some(message) = subscriber.receive() {
            last = Some(message);
        }
        assert_eq!(last, Some(FromVmm::Event(Event::Exited(ExitReason::Killed))));
        assert_eq!(vm.end().code, Some(7));
    }
}

#[test]
fn nonsense_on_the_control_socket_is_refused_and_the_vm_goes_on() {
    if possible() {
        let vm = Vm::run(code::prints_for_ever(), &["--control", "DIR/control"]);
        vm.wait_for(b'.');
        let control = vm.control();
        for bytes in [b"{}".to_vec(), b"\"fly\"".to_vec(), vec![0xFF; 100_000], b"\"stop\"".to_vec()] {
            control.send(&bytes);
            let answer = control.receive();
            assert!(matches!(answer, Some(FromVmm::Reply(Reply::Refused { .. }))), "{answer:?}");
        }
        let many: Vec<_> = (0..40).map(|_| vm.control()).collect();
        assert_eq!(control.status().phase, Phase::Running);
        drop(many);
        control.send(&serde_json::to_vec(&Request::Kill).unwrap());
        assert_eq!(vm.end().code, Some(7));
    }
}

#[test]
fn sigterm_ends_the_vm_in_order() {
    if possible() {
        let vm = Vm::run(code::prints_for_ever(), &[]);
        vm.wait_for(b'.');
        // SAFETY: no pointers are involved; the child was not waited for, so the number is still its.
        unsafe { libc::kill(vm.process().cast_signed(), libc::SIGTERM) };
        assert_eq!(vm.end().code, Some(7));
    }
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    if possible() {
        let elf = code::entered_by_pvh().elf();
        let mut arm = elf.clone();
        arm[18] = 183;
        let mut bzimage = vec![0; 0x4000];
        bzimage[0x1F1] = 1;
        bzimage[0x1F4..0x1F8].copy_from_slice(&0x10_0000u32.to_le_bytes());
        bzimage[0x1FE..0x202].copy_from_slice(&[0x55, 0xAA, 0xEB, 0x66]);
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        bzimage[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
        bzimage[0x236] = 1;
        let mut huge = elf.clone();
        huge[64 + 40..64 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
        for (kernel, problem) in [
            (vec![], "neither a bzImage nor an ELF file"),
            (b"#!/bin/sh\n".to_vec(), "neither a bzImage nor an ELF file"),
            (elf[..70].to_vec(), "is truncated"),
            (elf[..elf.len() - 1].to_vec(), "is truncated"),
            (arm, "is not a 64-bit x86-64 executable"),
            (bzimage, "is truncated"),
            (huge, "needs guest memory"),
        ] {
            let end = Vm::run_file(&kernel, &[]).end();
            assert_eq!(end.code, Some(2), "{end:?}");
            assert!(end.problems.contains("kernel") && end.problems.contains(problem), "{end:?}");
        }
    }
}

#[test]
fn sizes_that_are_not_possible_are_refused_with_field_and_range() {
    for (option, value, field) in [
        ("--vcpus", "0", "vcpus: 0 vCPUs asked for, 1 to 32"),
        ("--vcpus", "33", "vcpus: 33 vCPUs asked for, 1 to 32"),
        ("--memory", "1", "memory_mib: 1 MiB asked for"),
    ] {
        if possible() {
            let end = Vm::run(code::entered_by_pvh(), &[option, value]).end();
            assert_eq!(end.code, Some(2));
            assert!(end.problems.contains(field), "{end:?}");
        }
    }
    if possible() {
        let end = Vm::run(code::entered_by_pvh(), &["--memory", "1048576"]).end();
        assert_eq!(end.code, Some(3));
        assert!(end.problems.contains("the host has"), "{end:?}");
    }
}

/// Starts a VM as an agent does: descriptors by number and the configuration in one of them. With `control` a control socket
/// is made in the VM's directory and given under this name.
fn start_by_descriptors(
    mut config: VmConfig,
    mut given: Vec<(&str, OwnedFd)>,
    control: Option<&'static str>,
) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    given.extend(control.map(|name| (name, vm::listen(&directory.path().join("control")))));
    config.descriptors = given.iter().map(|(name, fd)| ((*name).to_owned(), fd.as_raw_fd())).collect();
    let path = directory.path().join("config");
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    for fd in given.iter().map(|(_, fd)| fd.as_raw_fd()).chain([file.as_raw_fd()]) {
        // SAFETY: no pointers are involved; the descriptor is open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
    command.args(["--config-fd", &file.as_raw_fd().to_string()]);
    Vm::spawn(command, directory)
}

fn config() -> VmConfig {
    VmConfig {
        vm: VmId::from_u128(7),
        vcpus: 1,
        memory_mib: 32,
        kvm: "kvm".into(),
        kernel: "kernel".into(),
        initramfs: None,
        cmdline: "logged".into(),
        guest: None,
        disks: vec![],
        nics: vec![],
        vsock: None,
        pmem: vec![],
        rng: true,
        rng_limit: RateLimit::default(),
        balloon: None,
        console: ConsoleConfig::default(),
        control: None,
        exit_record: None,
        boot_timer: false,
        memory: MemoryConfig::default(),
        cpu: None,
        restore: None,
        descriptors: BTreeMap::new(),
    }
}

fn kernel(guest: code::Guest) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&guest.elf()).unwrap();
    file.into()
}

fn open(path: &str) -> OwnedFd {
    std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap().into()
}

#[test]
fn an_agent_starts_a_vm_by_descriptors_and_reads_log_and_exit_record() {
    if possible() {
        let (mut log, mut record) =
            (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let mut config = config();
        config.console.log = Some("log".into());
        config.exit_record = Some("record".into());
        let given = vec![
            ("kvm", open("/dev/kvm")),
            ("kernel", kernel(code::prints_its_command_line())),
            ("log", open(log.path().to_str().unwrap())),
            ("record", open(record.path().to_str().unwrap())),
        ];
        assert_eq!(start_by_descriptors(config, given, None).end(), ended(0, ""));
        let (mut text, mut json) = (String::new(), String::new());
        log.read_to_string(&mut text).unwrap();
        record.read_to_string(&mut json).unwrap();
        assert_eq!(text, "logged");
        let record: ExitRecord = serde_json::from_str(&json).unwrap();
        assert_eq!((record.vm, record.reason), (VmId::from_u128(7), ExitReason::PowerOff));
    }
}

#[test]
fn a_console_client_reads_what_was_printed_and_types() {
    if possible() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let listener = UnixListener::bind(&path).unwrap();
        let mut config = config();
        config.console.listener = Some("console".into());
        let given =
            vec![("kvm", open("/dev/kvm")), ("kernel", kernel(code::echoes())), ("console", listener.into())];
        let vm = start_by_descriptors(config, given, None);
        let mut client = UnixStream::connect(&path).unwrap();
        let mut text = [0; 1];
        client.read_exact(&mut text).unwrap();
        client.write_all(b"abcq").unwrap();
        let mut echoed = String::new();
        client.read_to_string(&mut echoed).unwrap();
        assert_eq!((&text, echoed.as_str()), (b">", "abcq"));
        assert_eq!(vm.end().code, Some(0));
    }
}

#[test]
fn a_descriptor_that_is_not_kvm_is_told_as_a_problem_of_the_host() {
    let given = [("kvm", open("/dev/null")), ("kernel", kernel(code::entered_by_pvh()))];
    let end = start_by_descriptors(config(), given.into(), None).end();
    assert_eq!(end.code, Some(3));
    assert!(end.problems.contains("is it /dev/kvm?"), "{end:?}");
}

#[test]
fn a_configuration_that_is_none_is_refused() {
    for text in ["", "{", "{\"vcpu\":1}", &"x".repeat(2 << 20)] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        // SAFETY: no pointers are involved; the descriptor is open.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
        command.args(["--config-fd", &file.as_raw_fd().to_string()]);
        let end = Vm::spawn(command, directory).end();
        assert_eq!(end.code, Some(2));
        assert!(end.problems.contains("configuration:"), "{end:?}");
    }
    let end = Vm::spawn(
        {
            let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-vmm"));
            command.args(["--config-fd", "987"]);
            command
        },
        tempfile::tempdir().unwrap(),
    )
    .end();
    assert_eq!(end.code, Some(2));
}

/// Not a test of its own: [`a_forbidden_call_ends_the_process_with_its_number`] runs it in a process of its own.
#[test]
#[ignore = "ends its process; run by another test"]
fn child_that_opens_a_file() {
    let mut record = tempfile::tempfile().unwrap();
    blixard_vmm::sandbox::forbidden::record_in(record.as_fd(), VmId::from_u128(9));
    let phase = std::env::var("PHASE").unwrap();
    // SAFETY: no pointers are involved.
    let parent = unsafe { libc::fork() };
    if parent == 0 {
        blixard_vmm::sandbox::enter(false).unwrap();
        match phase.as_str() {
            "vcpu" => blixard_vmm::sandbox::enter_vcpu(false).unwrap(),
            "io" => blixard_vmm::sandbox::enter_io(false).unwrap(),
            _ => {}
        }
        let _ = std::fs::File::open("/dev/null");
        std::process::exit(0);
    }
    let mut status = 0;
    // SAFETY: the pointer is to an int.
    unsafe { libc::waitpid(parent, &raw mut status, 0) };
    let mut text = String::new();
    record.rewind().unwrap();
    record.read_to_string(&mut text).unwrap();
    let record: ExitRecord = serde_json::from_str(&text).unwrap();
    let call = u32::try_from(libc::SYS_open).unwrap();
    assert_eq!((record.vm, record.reason), (VmId::from_u128(9), ExitReason::Forbidden { call }));
    std::process::exit(libc::WEXITSTATUS(status));
}

#[test]
fn a_forbidden_call_ends_the_process_with_its_number() {
    for phase in ["set-up", "vcpu", "io"] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_opens_a_file", "--ignored", "--nocapture"])
            .env("PHASE", phase)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(8), "{phase}: {text}");
        assert!(text.contains(&format!("the forbidden system call {}", libc::SYS_open)), "{phase}: {text}");
    }
}
