//! The host's side: commands, networks that do not see each other, content that is the same in each run.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Where our programs are.
pub const PROGRAMS: &str = "/opt/blixard";
/// Address of the host in each of its networks.
pub const HOST: &str = "10.9.0.1";
/// Ports of the iperf servers: for load, for checks.
pub const PORTS: [&str; 2] = ["5201", "5202"];

/// Runs a program that must succeed; its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a shell script that must succeed.
pub fn sh(script: &str) -> String {
    run("sh", &["-ec", script])
}

/// `length` bytes that look random and are the same for the same `seed`.
pub fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // xorshift64*, Vigna 2016
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// A network of one VM: a namespace with a tap and iperf servers. All of them look the same to a guest.
pub struct Net {
    name: String,
    servers: Vec<Child>,
}

impl Net {
    /// Makes it.
    pub fn new(name: &str) -> Self {
        let name = format!("stock-{name}");
        sh(&format!(
            "ip netns add {name}
            ip -n {name} link set lo up
            ip -n {name} tuntap add tap0 mode tap
            ip -n {name} link set tap0 address 02:00:0a:09:00:01
            ip -n {name} address add {HOST}/24 dev tap0
            ip -n {name} link set tap0 up"
        ));
        let mut net = Self { name, servers: vec![] };
        for port in PORTS {
            let mut server = net
                .command("iperf3", &["-s", "-p", port, "--forceflush"])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
            net.servers.push(server);
            assert!(lines.any(|line| line.unwrap().contains("listening")), "iperf3 serves");
            // Somebody has to read what it prints later, or it would block.
            std::thread::spawn(move || lines.for_each(drop));
        }
        net
    }

    /// A program inside of it.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).args(args);
        command
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        // A test that fails tells why; what is left here would only hide it.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
