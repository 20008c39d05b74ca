-- meter.ts in Redis: see there for what a meter is. Each call is atomic. Numbers stay whole and below 2^53.
--
-- ARGV[1]  what to do: take, settle or renew
-- ARGV[2]  the time in microseconds; empty: that of the server, so that the clocks of gateways do not matter
-- then for each of KEYS
--   take    rate COST_US 0 0 | lease LIMIT ID TTL_US   returns whether all was taken, then a reading for each
--   settle  rate ADD_US 0 0  | lease 0 ID 0            returns nothing
--   renew   lease 0 ID TTL_US                          returns nothing; a lease that the server has lost is there again
local window_us = 60000000
local action = ARGV[1]
local now = tonumber(ARGV[2])
if now == nil then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end

local function text(number)
  return string.format('%.0f', number)
end

-- Keys go a minute after they say nothing any more: the server's clock may be set back a little.
local grace_ms = 60000

local function put_rate(key, full_at)
  redis.call('SET', key, text(full_at), 'PX', text(math.ceil((full_at - now) / 1000) + grace_ms))
end

local function put_lease(key, id, ttl)
  redis.call('ZADD', key, text(now + ttl), id)
  -- No lease is longer than another, so the last that is put outlives the rest.
  redis.call('PEXPIRE', key, text(math.ceil(ttl / 1000) + grace_ms))
end

local function argument(index, place)
  return ARGV[2 + (index - 1) * 4 + place]
end

if action == 'renew' then
  for index, key in ipairs(KEYS) do
    put_lease(key, argument(index, 3), tonumber(argument(index, 4)))
  end
  return {}
end

if action == 'settle' then
  for index, key in ipairs(KEYS) do
    if argument(index, 1) == 'rate' then
      local add = tonumber(argument(index, 2))
      local full_at = tonumber(redis.call('GET', key) or 0)
      if add > 0 then full_at = math.max(full_at, now) end
      full_at = full_at + add
      if full_at > now then put_rate(key, full_at) else redis.call('DEL', key) end
    else
      redis.call('ZREM', key, argument(index, 3))
    end
  end
  return {}
end

local readings = {}
local is_taken = true
for index, key in ipairs(KEYS) do
  if argument(index, 1) == 'rate' then
    readings[index] = math.max(tonumber(redis.call('GET', key) or 0) - now, 0)
    is_taken = is_taken and readings[index] + tonumber(argument(index, 2)) <= window_us
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', text(now))
    readings[index] = redis.call('ZCARD', key)
    is_taken = is_taken and readings[index] < tonumber(argument(index, 2))
  end
end
if is_taken then
  for index, key in ipairs(KEYS) do
    if argument(index, 1) == 'rate' then
      readings[index] = readings[index] + tonumber(argument(index, 2))
      if readings[index] > 0 then put_rate(key, now + readings[index]) end
    else
      readings[index] = readings[index] + 1
      put_lease(key, argument(index, 3), tonumber(argument(index, 4)))
    end
  end
end
return { is_taken and 1 or 0, unpack(readings) }
