//! An agent under test in folders of its own.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blixard_agent_api::plan::OnLeaseEnd;
use blixard_agent_api::{
    AgentClient, BlobRef, Digest, Epoch, Generation, HostPlan, HostReport, Phase, Run, Start, VmPlan,
    VmReport, VolumePlan,
};
use blixard_vmm_api::VmId;
use sha2::{Digest as _, Sha256};

/// Why the cases cannot run here.
pub fn cannot_run() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    if !Path::new("/dev/kvm").exists() {
        return Some("needs /dev/kvm to hand over".into());
    }
    if !blixard_agent::volume::file::MKFS.iter().any(|path| Path::new(path).exists()) {
        return Some("needs mkfs.ext4 (package e2fsprogs)".into());
    }
    None
}

pub struct Agent {
    pub folder: tempfile::TempDir,
    process: Option<Child>,
    pub client: AgentClient,
    pub options: Vec<String>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        for pid in self.vmms() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Agent {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("bxa").tempdir_in("/tmp").unwrap();
        let client = AgentClient::new(folder.path().join("run/agent.sock"));
        let mut agent = Self { folder, process: None, client, options: vec![] };
        agent.start();
        agent
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn start_without_waiting(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blixard-agent"));
        command.arg("--state").arg(self.path("state")).arg("--run").arg(self.path("run"));
        command.arg("--vmm").arg(std::env::current_exe().unwrap()).arg("--no-cgroup").args(&self.options);
        let log = std::fs::File::options().append(true).create(true).open(self.path("agent.log")).unwrap();
        command
            .env("RUST_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        self.process = Some(command.spawn().unwrap());
    }

    pub fn start(&mut self) {
        self.start_without_waiting();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.client.observe(0, 0, 0).is_err() {
            assert!(Instant::now() < deadline, "the agent does not answer:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// SIGKILL: no last words.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub fn restart(&mut self) {
        self.kill();
        self.start();
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(80)..].join("\n")
    }

    pub fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not in the log:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// Processes that run from this agent's state: VMMs have the volume open.
    pub fn vmms(&self) -> Vec<i32> {
        let ours = self.path("state/volumes");
        let mut found = vec![];
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if !command.starts_with(b"blixard-vmm\0") {
                continue;
            }
            let files = std::fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
            if files.flat_map(|fd| std::fs::read_link(fd.path())).any(|target| target.starts_with(&ours)) {
                found.push(pid);
            }
        }
        found
    }

    pub fn put(&self, content: &[u8]) -> BlobRef {
        let blob = blob(content);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        self.client.put_blob(blob, &file).unwrap();
        blob
    }

    /// Waits until the report is as wanted.
    pub fn until(&self, what: &str, wanted: impl Fn(&HostReport) -> bool) -> HostReport {
        let deadline = Instant::now() + Duration::from_secs(20);
        let (mut instance, mut revision) = (0, 0);
        loop {
            let report = self.client.observe(instance, revision, 1000).unwrap();
            if wanted(&report) {
                return report;
            }
            assert!(Instant::now() < deadline, "not {what}: {report:#?}\n{}", self.log());
            (instance, revision) = (report.agent_instance, report.revision);
        }
    }

    pub fn until_phase(&self, vm: VmId, phase: Phase) -> VmReport {
        let report =
            self.until(&format!("{phase:?}"), |report| of(report, vm).is_some_and(|v| v.phase == phase));
        of(&report, vm).unwrap().clone()
    }
}

pub fn blob(content: &[u8]) -> BlobRef {
    let digest = Digest::from_bytes(Sha256::digest(content).into());
    BlobRef { digest, size_bytes: content.len() as u64 }
}

pub fn of(report: &HostReport, vm: VmId) -> Option<&VmReport> {
    report.vms.iter().find(|v| v.vm == vm)
}

pub const CONTENT: [&[u8]; 3] = [b"kernel", b"initramfs", b"image"];

pub fn vm(number: u128, name: &str) -> VmPlan {
    VmPlan {
        vm: VmId::from_parts(1_795_000_000_000, number),
        name: name.into(),
        epoch: Epoch(1),
        run: Run::Running,
        start: Start(1),
        vcpus: 1,
        memory_mib: 128,
        kernel: blob(CONTENT[0]),
        initramfs: blob(CONTENT[1]),
        cmdline: String::new(),
        image: blob(CONTENT[2]),
        image_fs: "erofs".into(),
        volume: VolumePlan { size_bytes: 64 << 20 },
        nic: None,
        resolvers: vec![],
        workload: None,
        health: None,
        on_lease_end: OnLeaseEnd::RunOn,
    }
}

pub fn plan(generation: u64, vms: &[VmPlan]) -> HostPlan {
    HostPlan { generation: Generation(generation), vms: vms.to_vec(), ..HostPlan::default() }
}
