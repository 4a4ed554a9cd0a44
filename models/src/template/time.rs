//! `strftime` for templates that tell the model today's date.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::TimeZone;

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Seconds by which this machine's zone (`TZ`, else the system's) is ahead of UTC at a time; 0 where it isn't known.
pub(super) fn local_offset(time: SystemTime) -> i32 {
    let offset = |t| TimeZone::try_system().map(|zone| zone.to_offset(t).seconds());
    Timestamp::try_from(time).and_then(offset).unwrap_or(0)
}

/// A time on a clock `offset` seconds ahead of UTC, in Python's format for times that know no zone; the error names a
/// directive that isn't known.
pub(super) fn strftime(time: SystemTime, offset: i32, format: &str) -> Result<String, String> {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let seconds = seconds.saturating_add_signed(offset.into());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let month_name = MONTHS[month as usize - 1];
    // 1 January 1970 was a Thursday.
    let day_name = DAYS[((days + 3) % 7) as usize];
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let pad = directive != Some('-');
        if !pad {
            directive = chars.next();
        }
        let number = |n: u64| if pad { format!("{n:02}") } else { n.to_string() };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => number(hour),
            Some('I') => number(hour12),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('z' | 'Z') => String::new(),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("strftime_now: `%{other}` isn't known")),
            None => return Err("strftime_now: `%` at the end".to_owned()),
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of the day that many days after 1 January 1970, in the Gregorian calendar. Years begin in March
/// here, so that the leap day is a year's last.
fn date(days: u64) -> (u64, u64, u64) {
    // 719,468 days from 1 March of the year 0, which begins an era of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = year + era * 400 + u64::from(month >= 10);
    (year, if month < 10 { month + 3 } else { month - 9 }, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(UNIX_EPOCH + Duration::from_secs(seconds), 0, format).unwrap()
    }

    #[test]
    fn dates_follow_the_calendar_day_by_day() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..200_000 {
            assert_eq!(date(days), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }

    #[test]
    fn directives_are_those_of_python() {
        // 2024-07-26 15:04:09 UTC, a Friday.
        let t = 1_722_006_249;
        assert_eq!(at(t, "%d %b %Y"), "26 Jul 2024");
        assert_eq!(at(t, "%A, %B %d, %Y %H:%M:%S"), "Friday, July 26, 2024 15:04:09");
        assert_eq!(at(t, "%a %y-%m %-I %I%p %F %T 100%%"), "Fri 24-07 3 03PM 2024-07-26 15:04:09 100%");
        assert_eq!(at(0, "%e %I%p"), " 1 12AM");
        assert!(strftime(UNIX_EPOCH, 0, "%Q").unwrap_err().contains("%Q"));
        assert!(strftime(UNIX_EPOCH, 0, "50%").is_err());
    }

    #[test]
    fn clocks_ahead_of_utc_and_behind_it_turn_the_day_earlier_and_later() {
        let new_year = UNIX_EPOCH + Duration::from_secs(1_704_067_200);
        assert_eq!(strftime(new_year, 5 * 3600 + 1800, "%F %T%Z").unwrap(), "2024-01-01 05:30:00");
        assert_eq!(strftime(new_year, -3600, "%F %T").unwrap(), "2023-12-31 23:00:00");
        assert_eq!(strftime(UNIX_EPOCH, -3600, "%F").unwrap(), "1970-01-01", "no time is before the first");
    }
}
