//! QEMU's control protocol (QMP) over the socket pair that QEMU has as its standard input.
//!
//! Source: QEMU, `docs/interop/qmp-spec.txt` and the QAPI reference (`migration.json`).

use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::shell;

/// No message of QEMU comes near this many bytes.
const MAX_LINE: u64 = 4 << 20;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed; most often because QEMU has ended.
    #[error("cannot talk to QEMU")]
    Talk(#[source] io::Error),
    /// QEMU has ended or closed the socket.
    #[error("QEMU has ended")]
    Ended,
    /// A line was no JSON.
    #[error("QEMU sent something else than JSON")]
    Parse(#[source] serde_json::Error),
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// Device state could not be saved or restored.
    #[error("QEMU could not transfer the state of the devices")]
    Transfer,
}

/// A connection to one QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Reads the greeting and leaves the negotiation mode.
    pub fn connect(socket: UnixStream) -> Result<Self, Error> {
        let writer = socket.try_clone().map_err(Error::Talk)?;
        let mut qmp = Self { reader: BufReader::new(socket), writer };
        qmp.line()?;
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// No answer may take longer than this; `None` for no limit.
    pub fn patience(&self, time: Option<Duration>) -> Result<(), Error> {
        self.writer.set_read_timeout(time).map_err(Error::Talk)
    }

    /// Runs a command; events that come before its answer are dropped.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let message = json!({ "execute": command, "arguments": arguments });
        self.writer.write_all(format!("{message}\n").as_bytes()).map_err(Error::Talk)?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::Refused { command: command.to_owned(), reason: reason.to_owned() });
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Writes the device state (not the memory, which is a shared file) of a stopped machine to a file.
    pub fn save(&mut self, file: &Path) -> Result<(), Error> {
        self.transfer("migrate", &format!("exec:cat >{}", shell::quote(&file.to_string_lossy())))
    }

    /// Reads it back into a QEMU that waits for it.
    pub fn restore(&mut self, file: &Path) -> Result<(), Error> {
        self.transfer("migrate-incoming", &format!("exec:cat {}", shell::quote(&file.to_string_lossy())))
    }

    fn transfer(&mut self, command: &str, uri: &str) -> Result<(), Error> {
        let on = |name| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.ask("migrate-set-capabilities", capabilities)?;
        let message = json!({ "execute": command, "arguments": { "uri": uri } });
        self.writer.write_all(format!("{message}\n").as_bytes()).map_err(Error::Talk)?;
        loop {
            let line = self.line()?;
            if let Some(error) = line.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::Refused { command: command.to_owned(), reason: reason.to_owned() });
            }
            if line.get("event").and_then(Value::as_str) == Some("MIGRATION") {
                match line.pointer("/data/status").and_then(Value::as_str) {
                    Some("completed") => return Ok(()),
                    Some("failed" | "cancelled") => return Err(Error::Transfer),
                    _ => {}
                }
            }
        }
    }

    fn line(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        let length = self.reader.by_ref().take(MAX_LINE).read_line(&mut line).map_err(Error::Talk)?;
        if length == 0 {
            return Err(Error::Ended);
        }
        serde_json::from_str(&line).map_err(Error::Parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU that says these lines, whatever it is asked.
    fn scripted(lines: &str) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let lines = format!("{{\"QMP\":{{}}}}\n{{\"return\":{{}}}}\n{lines}");
        std::thread::spawn(move || {
            theirs.write_all(lines.as_bytes()).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            _ = io::copy(&mut theirs, &mut io::sink());
        });
        ours
    }

    #[test]
    fn events_before_an_answer_are_skipped() {
        let mut qmp = Qmp::connect(scripted("{\"event\":\"RESUME\"}\n{\"return\":{\"a\":1}}\n")).unwrap();
        assert_eq!(qmp.ask("x", json!({})).unwrap(), json!({"a": 1}));
        assert!(matches!(qmp.ask("x", json!({})), Err(Error::Ended | Error::Talk(_))));
    }

    #[test]
    fn a_refusal_carries_the_reason() {
        let mut qmp = Qmp::connect(scripted("{\"error\":{\"desc\":\"no\"}}\n")).unwrap();
        assert_eq!(qmp.ask("x", json!({})).unwrap_err().to_string(), "QEMU refused x: no");
    }

    #[test]
    fn a_transfer_ends_with_its_last_event() {
        let status = |s| format!("{{\"event\":\"MIGRATION\",\"data\":{{\"status\":\"{s}\"}}}}\n");
        let good =
            format!("{{\"return\":{{}}}}\n{{\"return\":{{}}}}\n{}{}", status("active"), status("completed"));
        assert!(Qmp::connect(scripted(&good)).unwrap().save(Path::new("/s")).is_ok());
        let bad = format!("{{\"return\":{{}}}}\n{{\"return\":{{}}}}\n{}", status("failed"));
        assert!(matches!(Qmp::connect(scripted(&bad)).unwrap().save(Path::new("/s")), Err(Error::Transfer)));
    }
}
