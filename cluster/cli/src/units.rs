//! Values of options: sizes, times, environment, labels; and how sizes and ages are shown.

use std::time::Duration;

/// A size with a unit in MiB.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    const FORMS: &str = "a number with a unit, for example 512M or 1G (K, M, G, T count in steps of 1024)";
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, unit) = text.split_at_checked(digits).ok_or(FORMS)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "" if !number.is_empty() => return Err(format!("the unit is missing: {text}M, {text}G?")),
        _ => return Err(FORMS.into()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u128 = whole.parse().map_err(|_| FORMS)?;
    if fraction.is_empty() || fraction.len() > 6 {
        return Err(FORMS.into());
    }
    let fraction_value: u128 = fraction.parse().map_err(|_| FORMS)?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let bytes = whole
        .checked_mul(scale)
        .and_then(|w| w.checked_add(fraction_value))
        .and_then(|n| n.checked_mul(1 << factor))
        .ok_or("larger than anything")?;
    if bytes % (scale << 20) != 0 {
        return Err("whole MiB are possible".into());
    }
    u64::try_from(bytes / (scale << 20)).map_err(|_| "larger than anything".into())
}

/// A size with a unit in MiB that fits 32 bits.
pub fn parse_mib_u32(text: &str) -> Result<u32, String> {
    parse_mib(text)?.try_into().map_err(|_| "larger than any memory".into())
}

/// A time: `30s`, `2m`, `1h`, `500ms`; a bare number counts seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const FORMS: &str = "a number with a unit, for example 500ms, 30s, 2m or 1h";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or(FORMS)?;
    let number: u64 = number.parse().map_err(|_| FORMS)?;
    let ms = match unit {
        "ms" => Some(number),
        "s" | "" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => return Err(FORMS.into()),
    };
    ms.map(Duration::from_millis).ok_or_else(|| "longer than anything".into())
}

/// `NAME=VALUE`, or `NAME` with its value from the environment of this process.
pub fn parse_env(text: &str) -> Result<(String, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => (text, std::env::var(text).map_err(|_| "it is not set here; NAME=VALUE sets one")?),
    };
    if name.is_empty() {
        return Err("the name is missing: NAME=VALUE".into());
    }
    Ok((name.into(), value))
}

/// `KEY=VALUE`.
pub fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("KEY=VALUE is possible".into()),
    }
}

/// Bytes for people.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut whole, mut rest, mut index) = (bytes / 1024, bytes % 1024, 0);
    while whole >= 1024 && index + 1 < UNITS.len() {
        (rest, whole) = (whole % 1024, whole / 1024);
        index += 1;
    }
    let unit = UNITS.get(index).unwrap_or(&"");
    match rest * 10 / 1024 {
        0 => format!("{whole} {unit}"),
        tenth => format!("{whole}.{tenth} {unit}"),
    }
}

/// An age or a duration for people, in its two largest units at most.
pub fn show_age(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..120 => format!("{s}s"),
        120..7200 => format!("{}m", s / 60),
        7200..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// A short duration for people: milliseconds below one second.
pub fn show_short(time: Duration) -> String {
    match time.as_millis() {
        ms @ 0..1000 => format!("{ms} ms"),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit_and_are_whole_mebibytes() {
        for (text, mib) in
            [("512M", 512), ("1G", 1024), ("1GiB", 1024), ("1.5g", 1536), ("2T", 2 << 20), ("2048K", 2)]
        {
            assert_eq!(parse_mib(text), Ok(mib), "{text}");
        }
        for wrong in
            ["", "1", "G", "1X", "-1G", "1.G", "100K", "1.0001M", "99999999999999999999T", "1 G", "ä"]
        {
            assert!(parse_mib(wrong).is_err(), "{wrong}");
        }
        assert!(parse_mib("512").unwrap_err().contains("512M"), "says what to write");
        assert!(parse_mib_u32("8192T").is_err());
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000), ("7", 7000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in ["", "s", "1d", "-1s", "1.5s", "99999999999999999999h", "9999999999999999999h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn environment_and_labels_are_pairs() {
        assert_eq!(parse_env("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_env("A="), Ok(("A".into(), String::new())));
        assert!(parse_env("=x").is_err() && parse_env("BLIXARD_THIS_IS_NOT_SET").is_err());
        assert_eq!(parse_label("a=b"), Ok(("a".into(), "b".into())));
        assert!(parse_label("a").is_err() && parse_label("=b").is_err());
    }

    #[test]
    fn bytes_and_ages_are_short() {
        assert_eq!(show_bytes(1023), "1023 B");
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(5 << 30), "5 GiB");
        assert_eq!(show_bytes(u64::MAX), "15.9 EiB");
        assert_eq!(show_age(119_999), "119s");
        assert_eq!(show_age(3_600_000), "60m");
        assert_eq!(show_age(200_000_000), "2d");
        assert_eq!(show_short(Duration::from_millis(999)), "999 ms");
    }
}
