//! How many durable writes per second a node answers: `writes SOCKET CLIENTS SECONDS`. Each client changes the grace time
//! of a VM of its own, again and again over one connection, so each request is one command through the log. VMs are made
//! of the image `img` when they are not there.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

struct Client(BufReader<UnixStream>);

impl Client {
    fn post(&mut self, path: &str, body: &str) -> Result<u16> {
        let length = body.len();
        let text = format!("POST {path} HTTP/1.1\r\nHost: n\r\nContent-Length: {length}\r\n\r\n{body}");
        self.0.get_mut().write_all(text.as_bytes())?;
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest.split(' ').next().context("no status")?.parse()?;
            } else if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse()?;
            }
        }
        std::io::copy(&mut self.0.by_ref().take(length), &mut std::io::sink())?;
        Ok(status)
    }
}

fn client(socket: &str, number: u128, end: Instant) -> Result<Vec<Duration>> {
    let mut client = Client(BufReader::new(UnixStream::connect(socket)?));
    let id = blixard_api::VmId::from_parts(1_795_000_000_000, number);
    let vms = "/v1/projects/default/vms";
    let body = format!(r#"{{"id":"{id}","name":"load-{number}","spec":{{"image":"img"}}}}"#);
    let status = client.post(vms, &body)?;
    if status != 201 && status != 200 {
        bail!("a VM cannot be made: {status}");
    }
    let path = format!("{vms}/load-{number}:stop");
    let mut times = Vec::new();
    while Instant::now() < end {
        let begin = Instant::now();
        // Another value than before, so that each request changes something.
        let body = format!(r#"{{"grace_ms":{}}}"#, times.len() + 1);
        if client.post(&path, &body)? != 200 {
            bail!("a write was refused");
        }
        times.push(begin.elapsed());
    }
    Ok(times)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().context("writes SOCKET CLIENTS SECONDS");
    let (socket, clients, seconds) = (next()?, next()?.parse::<u128>()?, next()?.parse::<u64>()?);
    let begin = Instant::now();
    let end = begin + Duration::from_secs(seconds);
    let threads: Vec<_> = (0..clients)
        .map(|number| {
            let socket = socket.clone();
            std::thread::spawn(move || client(&socket, number + 1, end))
        })
        .collect();
    let mut times = Vec::new();
    for thread in threads {
        times.extend(thread.join().ok().context("a client ended")??);
    }
    let took = begin.elapsed().as_secs_f64();
    times.sort();
    let count = u32::try_from(times.len())?;
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    let (p50, p99) = (at(50), at(99));
    println!("{clients} clients: {:.0} writes/s, p50 {p50:.2?}, p99 {p99:.2?}", f64::from(count) / took);
    Ok(())
}
