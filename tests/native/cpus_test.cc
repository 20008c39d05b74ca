#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "device.h"

namespace motet {
namespace {

class CgroupCpus : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(root_); }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
  }
  double cpus(const std::string& membership) const {
    write("membership", membership);
    return cgroup_cpus((root_ / "membership").string(), (root_ / "mount").string());
  }

 private:
  std::filesystem::path root_ = std::filesystem::path(testing::TempDir()) / ("motet-cpus-" + std::to_string(getpid()));
};

TEST_F(CgroupCpus, AreInfiniteWithoutQuota) {
  EXPECT_TRUE(std::isinf(cpus("0::/a")));
  write("mount/a/cpu.max", "max 100000");
  EXPECT_TRUE(std::isinf(cpus("0::/a")));
  EXPECT_TRUE(std::isinf(cpus("nonsense")));
}

TEST_F(CgroupCpus, AreTheLeastQuotaOnTheWayUp) {
  write("mount/a/b/cpu.max", "400000 100000");
  EXPECT_EQ(cpus("0::/a/b"), 4);
  write("mount/a/cpu.max", "150000 100000");
  EXPECT_EQ(cpus("0::/a/b"), 1.5);
  EXPECT_EQ(cpus("0::/"), INFINITY);
  write("mount/cpu.max", "50000 100000");
  EXPECT_EQ(cpus("0::/"), 0.5);
  EXPECT_EQ(cpus("0::/../elsewhere"), 0.5);
}

TEST_F(CgroupCpus, AreReadFromVersion1) {
  write("mount/cpu,cpuacct/a/cpu.cfs_period_us", "100000");
  write("mount/cpu,cpuacct/a/cpu.cfs_quota_us", "-1");
  EXPECT_TRUE(std::isinf(cpus("5:cpuset:/a\n4:cpu,cpuacct:/a\n0::/a")));
  write("mount/cpu,cpuacct/a/cpu.cfs_quota_us", "300000");
  EXPECT_EQ(cpus("5:cpuset:/a\n4:cpu,cpuacct:/a\n0::/a"), 3);
}

TEST(AvailableCpus, IsAtLeastOne) { EXPECT_GE(available_cpus(), 1); }

}  // namespace
}  // namespace motet
