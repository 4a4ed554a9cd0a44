//! Vision models: pictures in, statistics, plans and figures out.
